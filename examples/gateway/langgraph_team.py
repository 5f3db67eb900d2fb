"""The team of openai_sdk.py with LangGraph: the researcher is a graph that a tool of main's graph runs."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from library import search


def model(role: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=os.environ["OPENAI_BASE_URL"],  # 1. the address of this rollout
        api_key=os.environ["OPENAI_API_KEY"],  # 2. and its token
        model=role,  # 3. a model's name is the role of the agent
    )


researcher = create_react_agent(
    model("researcher"),
    [search],
    prompt="Search the library for the country, then answer with the one fact that was asked for.",
)


@tool
async def ask_researcher(question: str) -> str:
    """Ask the researcher a question."""
    state = await researcher.ainvoke({"messages": [("user", question)]}, {"recursion_limit": 8})
    return str(state["messages"][-1].content)


main = create_react_agent(
    model("main"),
    [ask_researcher],
    prompt="Answer in a few words. Ask the researcher for what you need to know, then repeat what it found.",
)


async def answer(question: str) -> str:
    """The team's answer to a question."""
    state = await main.ainvoke({"messages": [("user", question)]}, {"recursion_limit": 8})
    return str(state["messages"][-1].content)


if __name__ == "__main__":
    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))
