"""tasks/research with a judge behind HTTP: when it is asked, what it decides, and what its failures are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.tasks.research.scoring import gold_path, of_path
from mgrpo.types import Rollout
from tests.fake_services import Asked, FakeService
from tests.research_kit import FIJI, OTHERS, KitTask, agent, lines, said


def judged(asked: Asked) -> Any:
    """Right is what names Tonga's capital in any way; a report is worth .7."""
    prompt = asked.json["messages"][0]["content"]
    if "Grade the report" in prompt:
        words = '{"reason": "fine", "score": 7}'
    else:
        candidate = prompt.split("<candidate_answer>")[1].split("</candidate_answer>")[0]
        words = f'{{"reason": "x", "verdict": "{"correct" if "Tonga" in candidate else "incorrect"}"}}'
    return {"choices": [{"message": {"content": words}, "finish_reason": "stop"}]}


@pytest.fixture
def judge() -> Iterator[FakeService]:
    with FakeService(judged) as service:
        yield service


def options(judge: FakeService, **changes: object) -> dict[str, object]:
    table = {"url": judge.url, "model": "m", "attempts": 2, "backoff": 0.0, "asks": 2, "calibration": 0.0}
    return {"score": {"judge": table | changes, "expert": "judge"}}


def rolls(task: KitTask, *answers: str, question: Question = FIJI) -> list[Rollout]:
    """A rollout with each of these answers, and one sub-agent."""

    async def one(answer: str) -> Rollout:
        agents = {
            "main": agent("main", lines(said(ask="go"), said(answer=answer))),
            "sub": agent("sub", lines(said(report="y"))),
        }
        return await task.play(question, Episode("q", 0, agents, 1))

    async def all_of_them() -> list[Rollout]:
        try:
            return [await one(answer) for answer in answers]
        finally:
            await task.close()

    return asyncio.run(all_of_them())


def test_the_judge_decides_what_the_rule_does_not_accept(judge: FakeService) -> None:
    """An answer that the rule accepts costs no call; others are the judge's matter, and both are recorded."""
    exact, right, wrong = rolls(KitTask(options(judge)), "Nukualofa", "Tonga's capital", "Suva")
    found = [
        (r.correct, r.info["verdict"]["rule_score"], r.info["verdict"]["judge"])
        for r in (exact, right, wrong)
    ]
    assert found == [(1.0, 1.0, ""), (1.0, 0.0, "correct"), (0.0, 0.0, "incorrect")]
    assert right.info["verdict"]["source"] == "live" and exact.info["verdict"]["source"] == ""
    assert [r.metrics["rollout/task/judged"] for r in (exact, right, wrong)] == [[0.0], [1.0], [1.0]]
    assert {r.invocations["sub"][0].scores["expert"] for r in (exact, right, wrong)} == {0.7}
    assert len(judge.requests) == 2 + 3


def test_no_answer_is_not_judged(judge: FakeService) -> None:
    """Neither an answer nor a report: 0 without a call."""
    task = KitTask(options(judge) | {"limits": {"turns": 2, "turn_tokens": 300, "answer_tokens": 150}})

    async def run() -> Rollout:
        agents = {
            "main": agent("main", lines(said(ask="go"), "Hm.")),
            "sub": agent("sub", lambda chat: "Hm."),
        }
        try:
            return await task.play(FIJI, Episode("q", 0, agents, 1))
        finally:
            await task.close()

    rollout = asyncio.run(run())
    assert rollout.correct == 0.0 and rollout.invocations["sub"][0].scores == {"format": 0.0, "expert": 0.0}
    assert judge.requests == []


def test_a_judge_that_fails(judge: FakeService) -> None:
    """Down: infrastructure. Without a verdict: infrastructure. A refused key: the run ends."""
    cases: list[tuple[Any, type[Exception]]] = [("503", InfrastructureError), ("401", ServiceError)]
    for fault, kind in cases:
        judge.down = fault
        with pytest.raises(ExceptionGroup) as caught:
            rolls(KitTask(options(judge, max_outage=0.2)), "Suva")
        leaves = caught.value.exceptions
        assert any(isinstance(leaf, kind | ServiceError) for leaf in leaves)
    judge.down = None
    judge.answer = lambda asked: {
        "choices": [{"message": {"content": "I cannot say."}, "finish_reason": "stop"}]
    }
    with pytest.raises(ExceptionGroup) as caught:
        rolls(KitTask(options(judge)), "Suva")
    assert all(isinstance(leaf, InfrastructureError) for leaf in caught.value.exceptions)


def test_a_judge_that_is_not_calibrated(judge: FakeService) -> None:
    """It calls every known case incorrect: preflight ends the run before the first step."""
    task = KitTask(options(judge, calibration=0.9))

    async def run() -> None:
        try:
            await task.preflight()
        finally:
            await task.close()

    with pytest.raises(ConfigError, match="calibration"):
        asyncio.run(run())


def test_answers_of_the_judge_are_replayed(judge: FakeService, tmp_path: Path) -> None:
    """With a cassette the same rollout asks nobody, and says where the verdict came from."""
    recorded = options(judge) | {"cassette": {"path": str(tmp_path / "c.sqlite"), "mode": "record"}}
    (first,) = rolls(KitTask(recorded), "Tonga's capital")
    asked = len(judge.requests)
    replayed = recorded | {"cassette": {"path": str(tmp_path / "c.sqlite"), "mode": "replay"}}
    (second,) = rolls(KitTask(replayed), "Tonga's capital")
    assert len(judge.requests) == asked and first.correct == second.correct == 1.0
    assert second.info["verdict"]["source"] == "replay"
    assert second.invocations["sub"][0].scores == first.invocations["sub"][0].scores


def test_a_path_or_else_a_judge(judge: FakeService) -> None:
    """expert = "path" with an expert_judge: questions with a path are graded by it, others by the judge."""
    table = options(judge)["score"]["judge"]  # type: ignore[index]
    given = {"score": {"expert": "path", "expert_judge": table}}
    (with_path,) = rolls(KitTask(given), "Nukualofa")
    assert judge.requests == [] and with_path.invocations["sub"][0].scores["expert"] == 0.0
    (without,) = rolls(KitTask(given), "x", question=OTHERS[0])
    assert len(judge.requests) == 1 and without.invocations["sub"][0].scores["expert"] == 0.7


def test_gold_paths() -> None:
    """Every spelling counts; what the task names does not; a path of another shape is named."""
    path = gold_path(FIJI)
    assert path == [("Tonga",), ("Nukualofa", "Nuku'alofa")]
    assert of_path("x", "It is Tonga", path, ["TONGA."]) == 1.0
    assert of_path("about Tonga", "It is Tonga", path, ["Tonga"]) == 0.0
    assert of_path("about Tonga", "nuku'alofa", path, ["the capital, Nukualofa"]) == 1.0
    assert of_path("x", "Tongan", path, ["Tonga"]) == 0.0
    assert gold_path(OTHERS[0]) == []
    for wrong in ([{"value": 7}], ["Tonga"], {"value": "x"}):
        with pytest.raises(ConfigError, match="should be a list of tables"):
            gold_path(Question("q", "a", info={"path": wrong}))
