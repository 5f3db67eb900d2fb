"""A team of two with the OpenAI SDK: main asks a researcher, who searches the library.

A question comes in on stdin as JSON, the answer goes out on stdout. The three changed lines are numbered; against a
public service they hold its address, a key and a model's name.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from library import search
from openai import AsyncOpenAI
from shown import TO_MAIN, TO_RESEARCHER

client = AsyncOpenAI(
    base_url=os.environ["OPENAI_BASE_URL"],  # 1. the address of this rollout
    api_key=os.environ["OPENAI_API_KEY"],  # 2. and its key
)
MAIN, RESEARCHER = "main", "researcher"  # 3. a model's name is the role of its agent

Function = Callable[..., Awaitable[str]]


def schema(name: str, description: str, argument: str) -> dict[str, Any]:
    """A tool of one text."""
    texts = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": texts}}


async def agent(model: str, messages: list[Any], tool: dict[str, Any], function: Function) -> str:
    """Converse until a turn calls no tool; that turn is the answer."""
    for _ in range(4):
        completion = await client.chat.completions.create(model=model, messages=messages, tools=[tool])
        reply = completion.choices[0].message
        messages.append(reply)
        if not reply.tool_calls:
            return reply.content or ""
        results = await asyncio.gather(*(called(function, call.function) for call in reply.tool_calls))
        for call, result in zip(reply.tool_calls, results, strict=True):
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


async def called(function: Function, call: Any) -> str:
    """What a tool returns, or what was wrong with the call."""
    try:
        return await function(**json.loads(call.arguments))
    except (TypeError, ValueError) as error:
        return f"Error: {error}"


async def look_up(query: str) -> str:
    return search(query)


async def ask_researcher(question: str) -> str:
    system = "Search the library for the country, then answer with the one fact that was asked for."
    messages = [
        {"role": "system", "content": system},
        *TO_RESEARCHER,
        {"role": "user", "content": question},
    ]
    return await agent(RESEARCHER, messages, schema("search", "Search the library.", "query"), look_up)


async def answer(question: str) -> str:
    """The team's answer to a question."""
    system = "Answer in a few words. Ask the researcher for what you need to know, then repeat what it found."
    messages = [{"role": "system", "content": system}, *TO_MAIN, {"role": "user", "content": question}]
    tool = schema("ask_researcher", "Ask the researcher a question.", "question")
    return await agent(MAIN, messages, tool, ask_researcher)


if __name__ == "__main__":
    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))
