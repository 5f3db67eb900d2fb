"""A team of two with the OpenAI SDK: main asks a researcher, who searches the library.

A question as JSON comes in on stdin, the answer goes out on stdout. The three changed lines are numbered; against a
public service they would hold its address, a key and a model's name.
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

client = AsyncOpenAI(
    base_url=os.environ["OPENAI_BASE_URL"],  # 1. the address of this rollout
    api_key=os.environ["OPENAI_API_KEY"],  # 2. and its token
)
MAIN, RESEARCHER = "main", "researcher"  # 3. a model's name is the role of the agent

ASK = "Answer in a few words. Ask the researcher for what you need to know, then repeat what it found."
LOOK_UP = "Search the library for the country, then answer with the one fact that was asked for."


def tool(name: str, description: str, argument: str) -> dict[str, Any]:
    """The schema of a function of one text."""
    properties = {argument: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


async def agent(
    model: str, system: str, task: str, schema: dict[str, Any], function: Callable[..., Awaitable[str]]
) -> str:
    """Converse until a turn calls no tool; that turn is the answer."""
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": task}]
    for _ in range(4):
        completion = await client.chat.completions.create(model=model, messages=messages, tools=[schema])
        reply = completion.choices[0].message
        messages.append(reply.model_dump(exclude_none=True))
        if not reply.tool_calls:
            return reply.content or ""
        results = await asyncio.gather(*(call(function, c.function.arguments) for c in reply.tool_calls))
        for asked, result in zip(reply.tool_calls, results, strict=True):
            messages.append({"role": "tool", "tool_call_id": asked.id, "content": result})
    return ""


async def call(function: Callable[..., Awaitable[str]], arguments: str) -> str:
    """A tool's result, or what was wrong with the call."""
    try:
        return await function(**json.loads(arguments))
    except TypeError as error:
        return f"Error: {error}"


async def look_up(query: str) -> str:
    return search(query)


async def ask_researcher(question: str) -> str:
    schema = tool("search", "Search the library.", "query")
    return await agent(RESEARCHER, LOOK_UP, question, schema, look_up)


async def answer(question: str) -> str:
    """The team's answer to a question."""
    schema = tool("ask_researcher", "Ask the researcher a question.", "question")
    return await agent(MAIN, ASK, question, schema, ask_researcher)


if __name__ == "__main__":
    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))
