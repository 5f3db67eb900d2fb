"""The OpenAI SDK's Responses API: with the whole history in each request, with the id of the last response in its place
(--previous), and streamed (--stream)."""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import AsyncOpenAI
from team import Function, Tool, results, run

client = AsyncOpenAI()


async def turn(**request: Any) -> Any:
    if "--stream" not in sys.argv:
        response = await client.responses.create(**request)
    else:
        async with client.responses.stream(**request) as stream:
            events = [event.type async for event in stream]
            response = await stream.get_final_response()
        assert events[0] == "response.created" and events[-1] == "response.completed"
    assert response.status == "completed"
    return response


async def agent(model: str, system: str, task: str, tool: Tool, function: Function) -> str:
    about = {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.schema,
        "strict": False,
    }
    history: list[Any] = [{"role": "user", "content": task}]
    last: dict[str, Any] = {}
    while True:
        response = await turn(model=model, instructions=system, input=history, tools=[about], **last)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return str(response.output_text)
        found = await results(function, [json.loads(call.arguments) for call in calls])
        outputs = [
            {"type": "function_call_output", "call_id": call.call_id, "output": result}
            for call, result in zip(calls, found, strict=True)
        ]
        if "--previous" in sys.argv:
            history, last = outputs, {"previous_response_id": response.id}
        else:
            history += [*response.output, *outputs]


run(agent)
