"""Credit: rewards are the gated sums of algorithm.md, their parts fit the task, and a missing score is never a 0."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mgrpo.config.reward import RewardConfig
from mgrpo.credit import check_names, reward_parts, trajectory_reward
from mgrpo.errors import ConfigError
from tests.runs import RELAY, command, started

MAIN = RewardConfig.model_validate({"format": 0.1, "correct": 0.9})
SUB = RewardConfig.model_validate({"format": 0.1, "outcome": 0.4, "expert": 0.5})


def open_gate(weights: RewardConfig) -> RewardConfig:
    return RewardConfig.model_validate({**weights.parts, "gate": False})


def test_main_is_paid_for_form_and_answer() -> None:
    """R_M = a_format * format + a_correct * correct."""
    assert trajectory_reward("main", MAIN, {"format": 1.0}, 1.0) == 1.0
    assert trajectory_reward("main", MAIN, {"format": 1.0}, 0.0) == pytest.approx(0.1)
    assert trajectory_reward("main", MAIN, {"format": 0.5}, 0.5) == pytest.approx(0.5)


def test_sub_is_paid_for_form_outcome_and_judge() -> None:
    """R_S = b_format * format + b_outcome * correct + b_expert * expert, for each invocation by itself."""
    assert trajectory_reward("sub", SUB, {"format": 1.0, "expert": 1.0}, 0.0) == pytest.approx(0.6)
    assert trajectory_reward("sub", SUB, {"format": 1.0, "expert": 0.0}, 1.0) == pytest.approx(0.5)
    assert trajectory_reward("sub", SUB, {"format": 0.5, "expert": 0.25}, 1.0) == pytest.approx(0.575)


@pytest.mark.parametrize(("role", "weights"), [("main", MAIN), ("sub", SUB)])
def test_an_invalid_format_earns_exactly_nothing(role: str, weights: RewardConfig) -> None:
    """The paper's gate, for both roles: format 0 is paid 0 in the best rollout; a graded format above 0 is valid."""
    best = dict.fromkeys({"format", *weights.parts} - {"correct", "outcome"}, 1.0)
    assert trajectory_reward(role, weights, best | {"format": 0.0}, 1.0) == 0.0
    assert trajectory_reward(role, weights, best | {"format": 1e-9}, 1.0) == pytest.approx(0.9)
    assert trajectory_reward(role, open_gate(weights), best | {"format": 0.0}, 1.0) == pytest.approx(0.9)


def test_any_named_score_can_be_paid() -> None:
    """Parts are free names; their order changes no bit of the sum."""
    parts = {"format": 0.1, "outcome": 0.7, "citation": 0.2, "brevity": 0.3}
    scores = {"format": 0.3, "citation": 0.9, "brevity": 1 / 3}
    sums = {
        trajectory_reward("sub", RewardConfig.model_validate(dict(order)), scores, 0.1)
        for order in itertools.permutations(parts.items())
    }
    (total,) = sums
    assert total == pytest.approx(0.03 + 0.07 + 0.18 + 0.1)
    named = [
        (p.name, p.weight, p.score) for p in reward_parts("sub", SUB, {"format": 1.0, "expert": 0.5}, 0.25)
    ]
    assert named == [("format", 0.1, 1.0), ("outcome", 0.4, 0.25), ("expert", 0.5, 0.5)]


def test_a_missing_score_is_an_error_only_where_it_counts() -> None:
    """A judge that did not answer must not look like a judge that said 0; an invalid trajectory needs no judge."""
    with pytest.raises(
        ConfigError, match=r"agents\.sub\.reward\.expert = 0\.5: the task does not score 'expert'"
    ):
        trajectory_reward("sub", SUB, {"format": 1.0}, 1.0)
    with pytest.raises(ConfigError, match="does not score 'expert'"):
        trajectory_reward("sub", open_gate(SUB), {"format": 0.0}, 1.0)
    assert trajectory_reward("sub", SUB, {"format": 0.0}, 1.0) == 0.0
    unpaid = RewardConfig.model_validate({"format": 1.0, "expert": 0.0, "correct": 0.0})
    assert trajectory_reward("sub", unpaid, {"format": 0.0}, 1.0) == 0.0
    assert trajectory_reward("sub", unpaid, {"format": 1.0}, 1.0) == 1.0


@pytest.mark.parametrize(
    ("role", "reward", "names", "message"),
    [
        ("sub", {"format": 0.1, "outcome": 0.4, "expert": 0.5}, {"format", "expert"}, None),
        ("main", {"correct": 1.0}, {"format"}, None),  # the gate uses it
        ("main", {"correct": 1.0, "gate": False}, set(), None),
        ("main", {"correct": 1.0, "expert": 0.0}, {"format"}, None),  # not paid, so it need not be there
        ("main", {"correct": 1.0, "formt": 0.1}, {"format"}, "agents.main.reward.formt = 0.1"),
        ("sub", {"outcome": 1.0}, {"format", "expert"}, "set agents.sub.reward.expert (0: known, not paid)"),
        ("main", {"correct": 1.0, "gate": False}, {"format"}, "set agents.main.reward.format (0: known"),
        ("main", {"correct": 1.0}, set(), "set agents.main.reward.gate = false"),
        ("sub", {"outcome": 1.0}, {"format", "outcome"}, "which is a name of the rollout's outcome"),
        (
            "sub",
            {"outcome": 1.0, "correct": 0.0},
            {"format", "correct"},
            "which is a name of the rollout's outcome",
        ),
    ],
)
def test_parts_and_scores_are_the_same_names(
    role: str, reward: dict[str, float], names: set[str], message: str | None
) -> None:
    """A part that the task does not score and a score that nothing weighs are refused by name."""
    weights = RewardConfig.model_validate(reward)
    if message is None:
        check_names(role, weights, names)
        return
    with pytest.raises(ConfigError) as error:
        check_names(role, weights, names)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        (
            "examples/atlas/atlas.toml",
            "agents.sub.reward.citation=0.2",
            "agents.sub.reward.citation = 0.2: the task does",
        ),
        (str(RELAY), "agents.left.reward={outcome=1}", "set agents.left.reward.expert (0: known, not paid)"),
    ],
)
def test_a_reward_that_does_not_fit_ends_the_run_by_name(
    config: str, override: str, message: str, tmp_path: Path
) -> None:
    """Before anything is written where the task declares its scores, at the first rollout where it does not; never as
    a rollout that is scored 0."""
    out = tmp_path / "run"
    with started(command("train", config, "--out", str(out), "--set", override)) as process:
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 2 and message in output.splitlines()[-1]
    assert out.exists() == (config == str(RELAY))
    assert not list(out.glob("agents/*/final"))
