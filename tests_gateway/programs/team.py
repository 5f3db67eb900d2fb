"""The team that the programs of this folder are: main asks a researcher, who searches the library of examples/gateway.

How an agent talks to its model is each program's own: agent(model, system, task, tool, function).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from library import search

Function = Callable[..., Awaitable[str]]


@dataclass(frozen=True)
class Tool:
    """A function of one text."""

    name: str
    description: str
    argument: str

    @property
    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {self.argument: {"type": "string"}},
            "required": [self.argument],
        }


class AgentLoop(Protocol):
    async def __call__(self, model: str, system: str, task: str, tool: Tool, function: Function) -> str: ...


def run(agent: AgentLoop) -> None:
    """Answer the question on stdin."""

    async def look_up(query: str) -> str:
        return search(query)

    async def ask(question: str) -> str:
        tool = Tool("search", "Search the library.", "query")
        return await agent("researcher", "Look it up, then report.", question, tool, look_up)

    async def answer(question: str) -> str:
        tool = Tool("ask_researcher", "Ask the researcher a question.", "question")
        return await agent("main", "Ask the researcher, then answer.", question, tool, ask)

    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))


async def results(function: Function, calls: list[dict[str, Any]]) -> list[str]:
    """Of all calls of a turn, which run at the same time."""
    return await asyncio.gather(*(function(**arguments) for arguments in calls))
