"""The task factbook, played by an oracle: scripts that know the gold path and reach it through the real tools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mgrpo.config.task import TaskConfig
from mgrpo.environments.loader import load_task
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError
from mgrpo.tasks.factbook.check import QUERIES
from mgrpo.tasks.factbook.pages import ROOT
from mgrpo.tasks.factbook.task import FactbookTask
from mgrpo.tools.calls import render
from mgrpo.types import Rollout
from tests.research_kit import END, Script, agent, roll, said, words_of

LIMITS = {
    "turns": 20,
    "turn_tokens": 300,
    "answer_tokens": 150,
    "observation_chars": 20_000,
    "observation_tokens": 20_000,
}
ROOM = 120_000  # a token is about a letter here


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("factbook")


def make(cache: Path, **options: Any) -> FactbookTask:
    return FactbookTask({"limits": LIMITS, "cache": str(cache), **options}, ("main", "sub"))


def steps(question: Question) -> list[Mapping[str, Any]]:
    path = question.info["path"]
    assert isinstance(path, list)
    return path


def task_of(step: Mapping[str, Any]) -> str:
    return f"Read {QUERIES[step['relation']]} of {step['entity']} ({step['relation']})."


def oracle_main(question: Question) -> Script:
    """Asks for one step after the other and answers with the last report."""

    def script(chat: str) -> str:
        results = chat.split("Result of ask:\n")[1:]
        if len(results) < len(steps(question)):
            return said(ask=task_of(steps(question)[len(results)]))
        return said(answer=results[-1].split(END)[0].strip())

    return script


def oracle_sub(task: FactbookTask, question: Question) -> Script:
    """Goes the way to the step's page by addresses that it has been shown, and reports the value when a page that it
    has opened shows it."""
    ways = {task_of(step): (step, route(task, step)) for step in steps(question)}

    def script(chat: str) -> str:
        turns = chat.split("<|im_start|>user\n")
        step, way = ways[turns[1].split(END)[0]]
        shown, opened = "".join(turns[2:]), "".join(chat.split("Result of visit:\n")[1:])
        visits = [turn for turn in chat.split("<|im_start|>assistant\n") if '"name": "visit"' in turn[:60]]
        at = sum(any(f'"{url}"' in visit for visit in visits) for url in way)
        if at == len(way) and str(step["value"]) in opened:
            return said(report=str(step["value"]))
        if way[min(at, len(way) - 1)] in shown + ROOT + "/" and at < len(way):
            return said(visit=way[at])
        if at:  # what it looks for stands further down
            part = 1 + sum(f'"{way[at - 1]}"' in visit for visit in visits)
            return render("hermes", ("visit", {"url": way[at - 1], "part": part}))
        words = (
            QUERIES[step["relation"]] if "Result of search" not in shown else step["url"].rpartition("/")[2]
        )
        return said(search=f"{step['entity']} {words}")

    return script


def route(task: FactbookTask, step: Mapping[str, Any]) -> list[str]:
    """Addresses from the search, or from the root by region and first page, to the step's page."""
    if task.world_options.mode == "search":
        return [step["url"]]
    home = f"{step['url'].rpartition('/')[0]}/introduction"
    region = next(page.url for page in task.world.index[1:] if home in [link.url for link in page.links])
    return [f"{ROOT}/", region, home, step["url"]]


def play(task: FactbookTask, question: Question) -> Rollout:
    return roll(task, question, ROOM, main=oracle_main(question), sub=oracle_sub(task, question))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "options", [{}, {"names": "invented"}, {"mode": "links"}], ids=["search", "renamed", "links"]
)
def test_the_oracle_is_always_right(cache: Path, options: dict[str, Any]) -> None:
    """By search, under invented names and by links alone: answer, format and every report are worth 1, and what it read
    were tool results. Questions that no training question shares an end with."""
    task = make(cache, **options)
    questions = task.questions("heldout", 3)
    rollouts = [play(task, question) for question in questions]
    asyncio.run(task.close())
    assert [r.info["answer"] for r in rollouts] == [q.answer for q in questions]
    assert mean([r.correct for r in rollouts]) == 1.0
    assert {r.main.scores["format"] for r in rollouts} == {1.0}
    scores = [t.scores for r in rollouts for t in r.invocations["sub"]]
    assert scores == [{"format": 1.0, "expert": 1.0}] * sum(len(steps(q)) for q in questions)
    statuses = {t["status"] for r in rollouts for t in r.info["tools"]}
    assert statuses == {"ok"}


def test_random_search_leads_nowhere(cache: Path) -> None:
    """With results that have nothing to do with the query the same oracle finds no page of its way."""
    task = make(cache, search="random")
    rollouts = []
    for question in task.questions("heldout", 4):
        sub = stubborn(steps(question)[0]["url"])
        rollouts.append(roll(task, question, ROOM, main=lines_of(question), sub=sub))
    asyncio.run(task.close())
    assert [r.correct for r in rollouts] == [0.0] * 4
    assert all(t.scores["expert"] == 0.0 for r in rollouts for t in r.invocations["sub"])


def lines_of(question: Question) -> Script:
    """Asks once and answers with the report."""

    def script(chat: str) -> str:
        if "Result of ask:" in chat:
            return said(answer=chat.split("Result of ask:\n")[1].split(END)[0].strip())
        return said(ask=task_of(steps(question)[0]))

    return script


def stubborn(url: str) -> Script:
    """Searches twice, and reports whether the page was among the results."""

    def script(chat: str) -> str:
        searches = chat.count('"name": "search"', chat.index("<|im_start|>user\n"))
        read = "".join(chat.split("<|im_start|>user\n")[2:])
        return said(report=f"found: {url in read}") if searches == 2 else said(search=f"{url} {searches}")

    return script


def test_closed_book_has_no_tools(cache: Path) -> None:
    """The control without tools: a sub-agent has nothing but its report, and no corpus is opened."""
    task = make(cache / "none", search="none")
    assert task.team["sub"].tools.names == () and not (cache / "none").exists()
    question = task.questions("validation", 1)[0]
    rollout = roll(task, question, ROOM, main=lambda chat: said(answer="Suva"), sub=lambda chat: "")
    assert rollout.correct == float(question.answer == "Suva") and "search(" not in words_of(rollout.main, 0)
    asyncio.run(task.close())


def test_options(cache: Path) -> None:
    """As [task.options] they are checked by name; controls and links mode give the tools that they say."""
    config = TaskConfig(name="factbook", options={"mode": "links", "hops": [2], "cache": str(cache)})
    task = load_task(config, ("main", "sub"))
    assert isinstance(task, FactbookTask) and task.team["sub"].tools.names == ("visit",)
    assert ROOT in task.team["sub"].prompt and {q.info["hops"] for q in task.questions("train", 9)} == {2}
    assert set(task.controls) == {"closed book"}  # there is no search to take away
    assert set(FactbookTask.controls) == {"random search", "closed book"}
    asyncio.run(task.close())
    for options, words in (
        ({"hops": [4]}, r"hops \[4\], expected some of \[2, 3\]"),
        ({"mode": "web"}, "options.mode: Input should be 'search' or 'links', got 'web'"),
        ({"tools": {"x": {"type": "corpus"}}}, "options.tools is set; the factbook has its own"),
        ({"nonsense": 1}, "options.nonsense"),
        ({"mode": "links", "search": "random"}, "search = 'random' has no effect in the mode 'links'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_task(TaskConfig(name="factbook", options={"cache": str(cache), **options}), ("main", "sub"))


def test_a_single_agent_has_the_tools(cache: Path) -> None:
    """Main alone searches and visits by itself."""
    task = FactbookTask({"limits": LIMITS, "cache": str(cache), "hops": [2]}, ("main",))
    question = task.questions("heldout", 1)[0]
    path = steps(question)

    def script(chat: str) -> str:
        done = chat.count("Result of visit")
        if done == len(path):
            return said(answer=path[-1]["value"])
        return render(
            "hermes", ("visit", {"url": path[done]["url"], "goal": QUERIES[path[done]["relation"]]})
        )

    assert roll(task, question, ROOM, main=script).correct == 1.0
    asyncio.run(task.close())
    assert agent("main", script).role == "main"


def test_examples_are_turns_of_the_chat(cache: Path) -> None:
    """A small model sees two kinds of work done before its own, as context; the question comes last and names the tool
    to begin with, and nothing of the examples is trained on."""
    task = make(cache, examples=True, format="json")
    question = task.questions("heldout", 1)[0]
    call = render("json", ("answer", {"answer": question.answer}))
    rollout = roll(task, question, ROOM, main=lambda chat: call, sub=lambda chat: "")
    read = words_of(rollout.main, 0)
    assert rollout.correct == 1.0 and rollout.main.scores == {"format": 1.0}
    assert read.index('{"name": "ask", "arguments": {"task": "capital of Utopia"}}') < read.index(
        question.text
    )
    assert f"Question: {question.text}\nBegin with ask." in read
    assert words_of(rollout.main, 1) == call + END
    assert task.chat_use.first[:3] == ("system", "user", "assistant") and task.chat_use.first[-1] == "user"
    asyncio.run(task.close())
    for options, roles, words in (
        ({"mode": "links"}, ("main", "sub"), "examples = true shows a search"),
        ({"search": "none"}, ("main",), "examples = true shows a search"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_task(
                TaskConfig(name="factbook", options={"examples": True, "cache": str(cache), **options}), roles
            )


def test_examples_of_a_single_agent_and_the_controls(cache: Path) -> None:
    """Main alone is shown the look-ups of one question after the other, with its own tools only; every control of a
    task with examples can be played."""
    options = {"examples": True, "format": "json", "cache": str(cache)}
    alone = load_task(TaskConfig(name="factbook", options=options), ("main",))
    assert isinstance(alone, FactbookTask)
    *shown, last = alone.team["main"].messages("What?")
    calls = [json.loads(str(m["content"])) for m in shown if m["role"] == "assistant"]
    two_hops = ["search", "visit", "search", "visit", "answer"]
    assert [call["name"] for call in calls] == ["search", "visit", "answer", *two_hops]
    assert calls[-1]["arguments"] == {"answer": "Amaurot"} and calls[5] == calls[0]
    assert last["content"] == "Question: What?\nBegin with search."
    for control in alone.controls.values():
        load_task(TaskConfig(name="factbook", options=options | dict(control)), ("main", "sub"))
