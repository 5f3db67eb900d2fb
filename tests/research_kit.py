"""A small world for the tests of tasks/research: two tools over four pages, questions in a list, agents that a script
plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.environments.task import Question, QuestionSource, Split
from mgrpo.tasks.research.task import ResearchTask
from mgrpo.tools.base import Observation, Result, Tool, ToolError
from mgrpo.tools.calls import Format, render
from mgrpo.types import Rollout, Trajectory
from tests.chat_templates import QWEN3
from tests.test_chat import CHATML, tokenizer

PLAIN = tokenizer(CHATML)  # no added tokens but the template's
QWEN = QWEN3.tokenizer()  # <tool_call>, </tool_call>, <think> ... are added tokens
END = "<|im_end|>"
PAGES = {
    "w/fiji": "Fiji. Its capital is Suva. Its neighbour across the sea is Tonga.",
    "w/tonga": "Tonga. Its capital is Nukualofa.",
    "w/suva": "Suva. Population 93,970.",
}
FIJI = Question(
    "What is the capital of Fiji's neighbour?",
    "Nukualofa",
    info={"path": [{"value": "Tonga"}, {"value": "Nukualofa", "names": ["Nuku'alofa"]}]},
    id="fiji-2",
    tags={"hops": "2"},
)
Script = Callable[[str], str]
"""The whole chat so far, template and all -> the next turn, without its end."""


class Search(Tool):
    """Pages that hold a word of the query. failure: raised in place of an answer."""

    name, description = "search", "Finds pages."
    parameters: Mapping[str, object] = {
        "type": "object",
        "properties": {"query": {"type": "string"}},
        "required": ["query"],
    }

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.queries, self.running, self.most = failure, list[str](), 0, 0

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        query = str(arguments["query"])
        self.queries.append(query)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if self.failure is not None:
            raise self.failure
        found = [url for url, text in PAGES.items() if any(w in text.lower() for w in query.lower().split())]
        return Observation.of_results([Result(PAGES[url].split(".")[0], url) for url in found])


class Visit(Tool):
    """A page."""

    name, description = "visit", "Opens a page."
    parameters: Mapping[str, object] = {
        "type": "object",
        "properties": {"url": {"type": "string"}},
        "required": ["url"],
    }

    def __init__(self, pages: Mapping[str, str] = PAGES) -> None:
        self.pages, self.closed = pages, 0

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        url = str(arguments["url"])
        if url not in self.pages:
            raise ToolError(f"There is no page {url}.")
        return Observation(self.pages[url])

    async def close(self) -> None:
        self.closed += 1


class Listed(QuestionSource):
    """The same few questions in every split."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.all = questions

    def question(self, index: int, seed: int) -> Question:
        return self.all[(index + seed) % len(self.all)]

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [self.all[i % len(self.all)] for i in range(n)]


OTHERS = [Question(f"What about suva number {i}?", "93,970", id=f"o{i}") for i in range(5)]


class KitTask(ResearchTask):
    """The task over this world. tools: in place of search and visit."""

    def __init__(
        self,
        options: Mapping[str, object] | None = None,
        roles: Sequence[str] = ("main", "sub"),
        tools: Sequence[Tool] | None = None,
    ) -> None:
        self._own = [Search(), Visit()] if tools is None else list(tools)
        super().__init__({"score": {"expert": "path"}, "limits": LIMITS, **(options or {})}, roles)

    def make_questions(self) -> QuestionSource:
        return Listed(OTHERS)

    def own_tools(self) -> Sequence[Tool]:
        return self._own


LIMITS = {"turn_tokens": 300, "answer_tokens": 150}


def said(form: Format = "hermes", **arguments: str) -> str:
    """said(search="x"): one call of that tool with its only argument."""
    keys = {"search": "query", "visit": "url", "ask": "task"}
    return render(form, *((name, {keys.get(name, name): value}) for name, value in arguments.items()))


def lines(*turns: str) -> Script:
    left = list(turns)
    return lambda chat: left.pop(0)


def agent(role: str, script: Script, max_length: int = 6000, words: Any = PLAIN) -> Agent:
    return Agent(role, ScriptedEngine(lambda chat: script(chat) + END, words), words, 1.0, max_length)


def roll(
    task: ResearchTask,
    question: Question = FIJI,
    max_length: int | Mapping[str, int] = 6000,
    words: Any = PLAIN,
    **scripts: Script,
) -> Rollout:
    """One rollout of roles played by scripts."""
    lengths = dict.fromkeys(scripts, max_length) if isinstance(max_length, int) else max_length
    agents = {r: agent(r, script, lengths[r], words) for r, script in scripts.items()}
    return asyncio.run(task.play(question, Episode("7/3", 1, agents, 1)))


def by_task(chats: Mapping[str, Sequence[str]]) -> Script:
    """Turns of sub-agents: words of the task -> its turns in order, whoever is first."""
    left = {task: list(turns) for task, turns in chats.items()}

    def script(chat: str) -> str:
        task = chat.split("<|im_start|>user\n")[1].split(END)[0]
        return left[task].pop(0)

    return script


def words_of(trajectory: Trajectory, wanted: int, by: Any = PLAIN) -> str:
    """What of a trajectory was sampled (1) or read (0)."""
    ids = [int(t) for t, m in zip(trajectory.tokens, trajectory.loss_mask, strict=True) if m == wanted]
    return str(by.decode(ids))
