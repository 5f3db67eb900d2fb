"""The example's team of LangGraph, its tokens streamed."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import langgraph_team as team


async def answer(question: str) -> str:
    chunks = 0
    state: dict[str, Any] = {}
    async for mode, said in team.main.astream(
        {"messages": [("user", question)]}, stream_mode=["messages", "values"]
    ):
        if mode == "values":
            state = said
        chunks += mode == "messages"
    assert chunks > len(state["messages"])
    return str(state["messages"][-1].content)


if __name__ == "__main__":
    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))
