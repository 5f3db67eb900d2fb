"""tasks/research: its options, prompts and controls, what is refused, and its part before and after a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import pytest

from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.tasks.research.options import read_options
from tests.research_kit import OTHERS, PAGES, KitTask, Search, Visit, agent, lines, roll, said, words_of


def test_random_search() -> None:
    """The control searches for another question's text, the same for the same query, whatever was asked."""
    search = Search()
    task = KitTask({"score": {}, "random_search": True}, roles=("main",), tools=[search, Visit()])
    turns = [said(search="fiji"), said(search="fiji"), said(visit="w/fiji"), said(answer="x")]
    rollout = roll(task, main=lines(*turns))
    assert len(set(search.queries)) == 1 and search.queries[0] in {q.text for q in OTHERS}
    assert PAGES["w/fiji"] in words_of(rollout.main, 0)
    assert json.loads(rollout.info["tools"][0]["arguments"]) == {"query": "fiji"}
    assert task.controls == {"random search": {"random_search": True}}


def test_prompts() -> None:
    """A prompt of one's own has its placeholders replaced once; the date is the config's; braces stay."""
    own = "Day {date}. {tools} {format} {other} {{x}}"
    task = KitTask({"agents": {"main": {"prompt": own}}, "date": "2025-11-17"})
    prompt = task.team["main"].prompt
    assert prompt.startswith("Day Today is 2025-11-17.. Tools:") and prompt.endswith("{other} {{x}}")
    assert "Today is 2025-11-17." in task.team["sub"].prompt
    assert "Today" not in KitTask().team["sub"].prompt
    assert '"ask"' in prompt and '"report"' not in prompt and '"report"' in task.team["sub"].prompt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tooos": {}}, "options.tooos"),
        ({"limits": {"turns": 1}}, "options.limits.turns"),
        ({"limits": {"turn_tokens": 20}}, r"answer_tokens=256 must be at most turn_tokens=20"),
        ({"date": "17.11.2025"}, "options.date: date='17.11.2025', expected a day"),
        ({"format": "xml"}, "options.format"),
        ({"agents": {"helper": {}}}, "options.agents.helper: the run has no such role"),
        ({"agents": {"sub": {"tools": ["google"]}}}, "options.agents.sub.tools: no tool 'google'; there are search, "),
        ({"agents": {"sub": {"prompt": "a", "prompt_file": "b"}}}, "prompt and prompt_file exclude each other"),
        ({"agents": {"sub": {"prompt_file": "/nowhere"}}}, "options.agents.sub.prompt_file '/nowhere'"),
        ({"score": {"expert": "judge"}}, 'options.score.expert "judge" needs score.expert_judge'),
        ({"score": {"expert_judge": {"url": "http://x", "model": "m"}}}, "expert_judge has no effect"),
        ({"score": {"judge": {"url": "http://x"}}}, "options.score.judge.model: Field required"),
        ({"score": {"rule": "magic"}}, "rule 'magic' is unknown"),
    ],
)  # fmt: skip
def test_refusals(options: Mapping[str, object], words: str) -> None:
    """Settings that cannot work are refused by name before anything starts."""
    with pytest.raises((ValueError, ConfigError), match=words):
        KitTask(options)


def test_names_that_are_taken() -> None:
    """A tool may not be called as what ends an agent's work or gives a task."""

    class Report(Visit):
        name = "report"

    with pytest.raises(ValueError, match="'report' is the name of a tool of sub's own"):
        KitTask(tools=[Report()])
    with pytest.raises(ValueError, match="expected 'main' first"):
        KitTask(roles=("sub", "main"))


def test_closed_book() -> None:
    """Without any tools the same config plays: agents know nothing but `ask`, `report` and `answer`."""
    task = KitTask({"agents": {"sub": {"tools": ["search", "visit"]}}}, tools=[])
    assert "from what you know" in task.team["sub"].prompt
    rollout = roll(task, main=lines(said(ask="go"), said(answer="x")), sub=lines(said(report="y")))
    assert rollout.main.scores == {"format": 1.0}


def test_a_question_nobody_can_grade() -> None:
    """expert = "path" and a question without a path: the run ends by name, it is no score of 0."""
    with pytest.raises(ExceptionGroup) as caught:
        roll(KitTask(), OTHERS[0], main=lines(said(ask="go"), said(answer="x")), sub=lines(said(report="y")))
    assert caught.group_contains(ConfigError, match=r"question 'o0' has no gold path")


def test_the_record_can_be_read_by_role() -> None:
    """Long arguments are cut, attachments are named to main, and what the policy spells is kept apart from JSON."""
    question = Question("What is in the file?", "x", attachments=("/data/a b.xlsx",))
    task = KitTask({"score": {}, "limits": {"turn_tokens": 1000}})
    main = lines(said(ask="é" * 400), said(answer="x"))
    rollout = roll(task, question, main=main, sub=lines(said(report="y")))
    assert "Files: a b.xlsx" in words_of(rollout.main, 0)
    assert len(rollout.info["tools"][0]["arguments"]) == 300 and rollout.correct == 1.0


def test_start_validation() -> None:
    """The rates of well-formed turns of each role and of right answers; a service that fails is tried again."""
    task = KitTask({"score": {}})
    answers = iter(["93,970", "Suva"] * 4)
    agents = {
        "main": agent(
            "main", lambda chat: said(ask="go") if "Result" not in chat else said(answer=next(answers))
        ),
        "sub": agent("sub", lambda chat: "Hm." if "Error" not in chat else said(report="y")),
    }
    report = asyncio.run(task.validate_start(agents, 4, 1))
    assert report.figures["main_format"][0] == 1.0 and report.figures["sub_format"][0] == 0.5
    assert report.figures["correct"] == (0.5, 0.0, 0.95) and report.valid
    search = Search(InfrastructureError("down"))
    task = KitTask({"score": {}}, roles=("main",), tools=[search])
    failing = {"main": agent("main", lambda chat: said(search="x"))}
    with pytest.raises(InfrastructureError, match="start validation, question 0: tool 'search' failed"):
        asyncio.run(task.validate_start(failing, 1, 1))
    assert len(search.queries) == 3


def test_preflight_and_close() -> None:
    """Tools and judges are asked before the first step, and everything is closed, more than once too."""
    visit = Visit()
    task = KitTask(tools=[visit])

    async def run() -> None:
        await task.preflight()
        await task.close()
        await task.close()

    asyncio.run(run())
    assert visit.closed == 2


def test_options_are_read_by_name() -> None:
    """What is left out has the documented defaults, the paper's number of turns among them."""
    options = read_options({})
    assert (options.limits.turns, options.limits.asks, options.format) == (20, 8, "hermes")
