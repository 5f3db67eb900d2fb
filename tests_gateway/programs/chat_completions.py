"""The OpenAI SDK's Chat Completions, plain, streamed (--stream), or with a wire that loses every second answer on its
way back, after the server has sent it (--lose)."""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx2
from openai import AsyncOpenAI
from team import Function, Tool, results, run


class Lossy(httpx2.AsyncHTTPTransport):
    """Breaks the connection behind every second answer; the SDK tries again by itself."""

    answers = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        self.answers += 1
        if self.answers % 2:
            await response.aread()
            await response.aclose()
            raise httpx2.ReadError("the answer is lost", request=request)
        return response


client = AsyncOpenAI(
    http_client=httpx2.AsyncClient(transport=Lossy()) if "--lose" in sys.argv else None, max_retries=3
)


async def turn(**request: Any) -> Any:
    """The assistant's message."""
    if "--stream" in sys.argv:
        async with client.chat.completions.stream(
            **request, stream_options={"include_usage": True}
        ) as stream:
            events = [event async for event in stream]
            completion = await stream.get_final_completion()
        assert any(event.type == "chunk" for event in events)
    else:
        completion = await client.chat.completions.create(**request)
    assert (
        completion.usage is not None
        and completion.usage.prompt_tokens > 0 < completion.usage.completion_tokens
    )
    (choice,) = completion.choices
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    return choice.message


async def agent(model: str, system: str, task: str, tool: Tool, function: Function) -> str:
    about = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": task}]
    while True:
        reply = await turn(model=model, messages=messages, tools=[{"type": "function", "function": about}])
        messages.append(reply)
        if not reply.tool_calls:
            return reply.content
        found = await results(function, [json.loads(c.function.arguments) for c in reply.tool_calls])
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": result}
            for call, result in zip(reply.tool_calls, found, strict=True)
        ]


run(agent)
