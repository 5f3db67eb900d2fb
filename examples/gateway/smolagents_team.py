"""The team of openai_sdk.py with smolagents: the researcher is a managed agent. It needs history = "keep"."""

from __future__ import annotations

import json
import os
import sys

from library import search
from smolagents import CodeAgent, LogLevel, OpenAIModel, ToolCallingAgent, tool


def model(role: str) -> OpenAIModel:
    return OpenAIModel(
        api_base=os.environ["OPENAI_BASE_URL"],  # 1. the address of this rollout
        api_key=os.environ["OPENAI_API_KEY"],  # 2. and its token
        model_id=role,  # 3. a model's name is the role of the agent
    )


def team() -> CodeAgent | ToolCallingAgent:
    """Main and its researcher: agents that call tools, or that write Python."""
    kind = CodeAgent if os.environ.get("TEAM_AGENT") == "code" else ToolCallingAgent
    quiet = {"verbosity_level": LogLevel.OFF, "max_steps": 4}
    researcher = kind(
        [tool(search)],
        model("researcher"),
        name="researcher",
        description="Searches the library for what you ask.",
        **quiet,
    )
    return kind([], model("main"), managed_agents=[researcher], **quiet)


def answer(question: str) -> str:
    """The team's answer to a question."""
    return str(team().run(question))


if __name__ == "__main__":
    print(json.dumps({"answer": answer(json.load(sys.stdin)["text"])}))
