"""Credit: rewards are the weighted sums of algorithm.md, and a missing score is never a 0."""

from __future__ import annotations

import pytest

from mgrpo.config.run import RewardConfig
from mgrpo.credit import trajectory_reward

MAIN = RewardConfig(format=0.1, correct=0.9)
SUB = RewardConfig(format=0.1, outcome=0.5, expert=0.4)


def test_main_is_paid_for_form_and_answer() -> None:
    """R_M = a_format * format + a_correct * correct."""
    assert trajectory_reward("main", MAIN, {"format": 1.0}, 1.0) == pytest.approx(1.0)
    assert trajectory_reward("main", MAIN, {"format": 1.0}, 0.0) == pytest.approx(0.1)
    assert trajectory_reward("main", MAIN, {"format": 0.0}, 0.5) == pytest.approx(0.45)


def test_sub_is_paid_for_form_outcome_and_judge() -> None:
    """R_S = b_format * format + b_outcome * correct + b_expert * expert, for each invocation by itself."""
    assert trajectory_reward("sub", SUB, {"format": 1.0, "expert": 1.0}, 0.0) == pytest.approx(0.5)
    assert trajectory_reward("sub", SUB, {"format": 1.0, "expert": 0.0}, 1.0) == pytest.approx(0.6)
    assert trajectory_reward("sub", SUB, {"format": 0.0, "expert": 0.25}, 1.0) == pytest.approx(0.6)


def test_a_missing_score_is_an_error_only_where_it_counts() -> None:
    """A judge that did not answer must not look like a judge that said 0."""
    with pytest.raises(ValueError, match="no score 'expert'"):
        trajectory_reward("sub", SUB, {"format": 1.0}, 1.0)
    assert trajectory_reward("sub", RewardConfig(format=1.0), {"format": 1.0}, 1.0) == 1.0
