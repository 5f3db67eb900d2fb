"""Hierarchical credit: from scores to the reward of each trajectory.

    main:  R_M(k)    = a_format * format + a_correct * correct
    sub:   R_S(k, i) = b_format * format(k, i) + b_outcome * correct(k) + b_expert * expert(k, i)

A sub-agent's invocation is paid for its own form, for the outcome of the rollout it served and for a judge's view of
this one invocation (arXiv 2511.13288, section 3; the weights are configuration). A missing score is an error, never 0:
whoever could not score a trajectory must drop it as an infrastructure failure.
"""

from __future__ import annotations

from collections.abc import Mapping

from mgrpo.config.run import RewardConfig
from mgrpo.types import MAIN


def trajectory_reward(role: str, weights: RewardConfig, scores: Mapping[str, float], correct: float) -> float:
    """Reward of one trajectory of `role`; scores are its own parts in [0, 1], correct is its rollout's outcome."""
    parts = {"format": weights.format}
    outcome = weights.correct
    if role != MAIN:
        outcome = weights.outcome
        parts["expert"] = weights.expert
    total = outcome * correct
    for name, weight in parts.items():
        if weight == 0:
            continue
        if name not in scores:
            raise ValueError(f"trajectory of role {role!r} has no score {name!r}; it has {sorted(scores)}")
        total += weight * scores[name]
    return total
