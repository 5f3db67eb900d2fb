"""The example's team of the Agents SDK, streamed; --handoff: main hands the conversation over in place of asking."""

from __future__ import annotations

import asyncio
import json
import sys

import agents_sdk as team
from agents import Agent, Runner


async def answer(question: str) -> str:
    main = team.main
    if "--handoff" in sys.argv:
        main = Agent(name="Main", model=team.MAIN, instructions="Hand over.", handoffs=[team.researcher])
    result = Runner.run_streamed(main, question, run_config=team.config, max_turns=4)
    kinds = {event.type async for event in result.stream_events()}
    assert {"raw_response_event", "run_item_stream_event"} <= kinds
    return str(result.final_output)


if __name__ == "__main__":
    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))
