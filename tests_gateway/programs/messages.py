"""Anthropic's SDK: Messages with tools, plain and streamed (--stream)."""

from __future__ import annotations

import sys
from typing import Any

from anthropic import AsyncAnthropic
from team import Function, Tool, results, run

client = AsyncAnthropic()


async def turn(**request: Any) -> Any:
    if "--stream" in sys.argv:
        async with client.messages.stream(**request) as stream:
            events = [event.type async for event in stream]
            message = await stream.get_final_message()
        assert events[0] == "message_start" and events[-1] == "message_stop"
    else:
        message = await client.messages.create(**request)
    assert message.usage.input_tokens > 0 < message.usage.output_tokens
    return message


async def agent(model: str, system: str, task: str, tool: Tool, function: Function) -> str:
    about = {"name": tool.name, "description": tool.description, "input_schema": tool.schema}
    messages: list[Any] = [{"role": "user", "content": task}]
    while True:
        message = await turn(model=model, max_tokens=1024, system=system, messages=messages, tools=[about])
        calls = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == ("tool_use" if calls else "end_turn")
        if not calls:
            return "".join(block.text for block in message.content if block.type == "text")
        found = await results(function, [call.input for call in calls])
        answers = [
            {"type": "tool_result", "tool_use_id": call.id, "content": result}
            for call, result in zip(calls, found, strict=True)
        ]
        messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": answers}]


run(agent)
