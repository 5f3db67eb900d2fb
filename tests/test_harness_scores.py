"""Scores of a harness: from its task, with its answer or posted; whatever is missing or does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mgrpo.environments.task import Question
from mgrpo.errors import RolloutError
from mgrpo.gateway.harness import Access, Answer, Score
from mgrpo.gateway.scores import merged_scores, read_answer
from tests.harness_kit import FunctionTask, played, post, rollout_of, team

DECLARED = {"scores": {"main": ["format"], "sub": ["format", "expert"]}}


def test_scores_of_roles_and_invocations() -> None:
    """A score of a whole role counts for each invocation, unless one has its own; what was posted fills the rest."""

    async def run(question: Question, base_url: Access) -> object:
        await team(question, base_url)
        for number, value in ((0, 0.75), (1, 0.5)):
            what = {"role": "sub", "invocation": number, "name": "expert", "value": value}
            await post(base_url, f"{base_url.root}/reward", what)
        return Answer("x", scores={"main": {"format": 0.1}, ("sub", 1): {"expert": 1.0}})

    def score(question: Question, answer: object) -> Score:
        return Score(0.5, {"main": {"format": 1.0}, ("sub", 0): {"format": 0.0}, "sub": {"format": 0.25}})

    rollout = rollout_of(played(FunctionTask(run, DECLARED, score)))
    assert rollout.correct == 0.5 and rollout.main.scores == {"format": 1.0}
    assert [t.scores for t in rollout.invocations["sub"]] == [
        {"format": 0.0, "expert": 0.75}, {"format": 0.25, "expert": 1.0},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (
            {"main": {"format": 1.0}, "sub": {"format": 1.0}},
            "invocation 0 of role 'sub' has no score 'expert'",
        ),
        (
            {"main": {"format": 1, "style": 1}, "sub": {"format": 1, "expert": 1}},
            "'style' that its task does not",
        ),
        ({"other": {"format": 1.0}}, "unknown role 'other'"),
        ({("sub", 2): {"format": 1.0}}, "no invocation of this rollout"),
        (
            {"main": {"format": 2.0}, "sub": {"format": 1, "expert": 1}},
            r"is 2.0, expected a number in \[0, 1\]",
        ),
        (
            {"main": {"format": "high"}, "sub": {"format": 1, "expert": 1}},
            "score 'format' of invocation 0 of role",
        ),
    ],
)
def test_scores_that_do_not_fit_are_named(scores: Any, words: str) -> None:
    """Nothing is scored 0 in their place."""
    with pytest.raises(RolloutError, match=words):
        merged_scores([("main", 0), ("sub", 0), ("sub", 1)], DECLARED["scores"], scores)


def test_a_missing_score_fails_the_rollout() -> None:
    """By name, as the task's matter."""
    result = played(FunctionTask(team, DECLARED))
    assert result.rollout is None and result.kind == "task" and result.attempt == 0
    assert "has no score 'format', which its task declares" in result.failure


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"correct": 1}, "needs the field 'answer'"),
        ({"answer": 1, "score": 1}, "has no field 'score'"),
        ({"answer": 1, "correct": 2}, "correct of it is 2"),
        ({"answer": 1, "correct": "1"}, "correct of it is '1'"),
        ({"answer": 1, "scores": [1]}, "expected a table of roles"),
        ({"answer": 1, "scores": {"sub": 1}}, "expected a table or a list"),
        ({"answer": 1, "scores": {"sub": [1]}}, "expected a table of numbers"),
        ({"answer": 1, "scores": {"sub": {"format": None}}}, "score 'format' of 'sub' of it is None"),
    ],
)
def test_an_answer_in_json_that_is_none_is_named(body: Mapping[str, object], words: str) -> None:
    """Field and value."""
    with pytest.raises(RolloutError, match=words):
        read_answer(body, "it")


def test_an_answer_in_json() -> None:
    """With scores of a role, and of each invocation of another."""
    scores = {"main": {"format": 1}, "sub": [{"expert": 0.5}, {"expert": 0}]}
    read = read_answer({"answer": [1], "correct": 1, "scores": scores}, "it")
    found = {"main": {"format": 1.0}, ("sub", 0): {"expert": 0.5}, ("sub", 1): {"expert": 0.0}}
    assert read == Answer([1], 1.0, found)
