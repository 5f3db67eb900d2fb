"""A deep-research task of one's own in one file: questions, a tool in Python, and the rest from mgrpo.

mgrpo train examples/deep_research/my_research.toml --out runs/rivers

The main agent asks sub-agents; those look lengths up with the tool below and with whatever [task.options.tools] of the
config gives them, for example the MCP server beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence

from mgrpo.environments.task import Question, QuestionSource, Split
from mgrpo.tasks.research.task import ResearchTask
from mgrpo.tools.base import Tool, ToolError
from mgrpo.tools.function import tool

KILOMETRES = {"Danube": 2850, "Elbe": 1094, "Loire": 1006, "Oder": 866, "Rhine": 1233, "Seine": 777}
HELD = {"validation": ("Elbe", "Oder"), "heldout": ("Loire", "Seine")}  # never trained on


@tool
async def length(river: str) -> str:
    """Length of a river.

    Args:
        river: Its English name.
    """
    if river not in KILOMETRES:
        raise ToolError(f"There is no river {river!r}. Rivers: {', '.join(KILOMETRES)}.")
    return f"The {river} is {KILOMETRES[river]} km long."


class Rivers(QuestionSource):
    """How long is each river?"""

    def question(self, index: int, seed: int) -> Question:
        held = {river for rivers in HELD.values() for river in rivers}
        rivers = [river for river in KILOMETRES if river not in held]
        return ask_length(rivers[(index + seed) % len(rivers)])

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        if split == "train":
            return [self.question(index, seed) for index in range(n)]
        return [ask_length(HELD[split][index % len(HELD[split])]) for index in range(n)]


def ask_length(river: str) -> Question:
    return Question(f"How many kilometres long is the {river}?", str(KILOMETRES[river]), id=river)


class Task(ResearchTask):
    """Named in the config as path = "my_research.py:Task"."""

    def make_questions(self) -> QuestionSource:
        return Rivers()

    def own_tools(self) -> Sequence[Tool]:
        return [length]
