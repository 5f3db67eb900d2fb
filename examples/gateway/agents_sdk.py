"""The team of openai_sdk.py with the OpenAI Agents SDK: the researcher is a tool of main."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from agents import Agent, OpenAIProvider, RunConfig, Runner, function_tool
from library import search

provider = OpenAIProvider(
    base_url=os.environ["OPENAI_BASE_URL"],  # 1. the address of this rollout
    api_key=os.environ["OPENAI_API_KEY"],  # 2. and its token
    use_responses=os.environ.get("TEAM_API", "responses") == "responses",  # or Chat Completions
)
MAIN, RESEARCHER = "main", "researcher"  # 3. a model's name is the role of the agent

config = RunConfig(model_provider=provider, tracing_disabled=True)
researcher = Agent(
    name="Researcher",
    model=RESEARCHER,
    instructions="Search the library for the country, then answer with the one fact that was asked for.",
    tools=[function_tool(search)],
)
main = Agent(
    name="Main",
    model=MAIN,
    instructions="Answer in a few words. Ask the researcher for what you need to know, then repeat what it found.",
    tools=[
        researcher.as_tool(
            tool_name="ask_researcher",
            tool_description="Ask the researcher a question.",
            run_config=config,
        )
    ],
)


async def answer(question: str) -> str:
    """The team's answer to a question."""
    result = await Runner.run(main, question, run_config=config, max_turns=4)
    return str(result.final_output)


if __name__ == "__main__":
    print(json.dumps({"answer": asyncio.run(answer(json.load(sys.stdin)["text"]))}))
