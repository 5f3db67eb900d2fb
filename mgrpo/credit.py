"""Hierarchical credit: from scores to the reward of each trajectory.

    main:  R_M(k)    = gate(k)    * (a_format * format(k)    + a_correct * correct(k) + ...)
    sub:   R_S(k, i) = gate(k, i) * (b_format * format(k, i) + b_outcome * correct(k) + b_expert * expert(k, i) + ...)

    gate = 0 where the trajectory's own format score is 0, else 1

A sub-agent's invocation is paid for its own form, for the outcome of the rollout it served and for a judge's view of
this one invocation (arXiv 2511.13288, equations 4 and 5). Names and weights are configuration (RewardConfig): `correct`
of the main agent and `outcome` of a sub-agent weigh the rollout's outcome, any other part the trajectory's score of
that name.

The paper's format is right or wrong. Where a task grades it, a trajectory is invalid when its score is exactly 0: a
task gives 0 to whatever is to earn nothing, and anything above it to what merely is less than perfect.

A missing score is an error, never 0: whoever could not score a trajectory must drop it as an infrastructure failure.
Only an invalid trajectory, which earns 0 whatever a judge thinks of it, need not be judged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mgrpo.config.reward import RewardConfig
from mgrpo.config.run import RunConfig
from mgrpo.errors import ConfigError
from mgrpo.types import MAIN

FORMAT = "format"
"""The score that the gate looks at."""
_OUTCOMES = ("correct", "outcome")  # what the main agent's and a sub-agent's part of it are called


@dataclass(frozen=True, slots=True)
class Part:
    """One term of a reward; score is None where an invalid trajectory was not judged."""

    name: str
    weight: float
    score: float | None


class StageRewards:
    """What the trajectories of every role earn, stage by stage of the run's curriculum (task.stages): that of a group
    follows from its number alone. Without stages it is agents.<role>.reward everywhere."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._rewards = {
            role: [config.stage_reward(role, stage) for stage in range(config.task.last_stage + 1)]
            for role in config.agents
        }

    def of_group(self, role: str, index: int) -> RewardConfig:
        """In rollout group number `index`."""
        return self._rewards[role][self._config.stage_of(index)]

    def of_evaluation(self, role: str) -> RewardConfig:
        """In an evaluation: what the last stage would pay."""
        return self._rewards[role][-1]


def trajectory_reward(role: str, weights: RewardConfig, scores: Mapping[str, float], correct: float) -> float:
    """Reward of one trajectory of `role`; scores are its own in [0, 1], correct is its rollout's outcome. The sum is
    rounded once, so the order of the parts does not matter. Raises ConfigError as check_names() does."""
    check_scores(role, weights, scores)
    if is_gated(weights, scores):
        return 0.0
    return math.fsum(p.weight * (p.score or 0.0) for p in reward_parts(role, weights, scores, correct))


def is_gated(weights: RewardConfig, scores: Mapping[str, float]) -> bool:
    """Whether the trajectory earns 0 because its format is invalid."""
    return weights.gate and scores.get(FORMAT) == 0


def reward_parts(role: str, weights: RewardConfig, scores: Mapping[str, float], correct: float) -> list[Part]:
    """The terms inside the gate, in the order of the config."""
    outcome = _outcome(role)
    return [
        Part(name, weight, correct if name == outcome else scores.get(name))
        for name, weight in weights.parts.items()
    ]


def check_names(role: str, weights: RewardConfig, names: Collection[str]) -> None:
    """Compare the reward of `role` with the names of the scores that a task gives its trajectories. Raises ConfigError
    naming a part that is not scored, or a score that no part weighs."""
    given = ", ".join(sorted(names)) or "none"
    parts, outcome, where = weights.parts, _outcome(role), f"agents.{role}.reward"
    for name, weight in parts.items():
        if weight and name != outcome and name not in names:
            raise ConfigError(
                f"{where}.{name} = {weight:g}: the task does not score {name!r} for role {role!r} (its scores: {given})"
            )
    if weights.gate and FORMAT not in names:
        raise ConfigError(
            f"{where}.gate = true needs the score {FORMAT!r}, which the task does not give role {role!r} "
            f"(its scores: {given}); set {where}.gate = false"
        )
    for name in sorted(names):
        if name in _OUTCOMES:
            raise ConfigError(
                f"the task gives role {role!r} a score {name!r}, which is a name of the rollout's outcome"
            )
        if name not in parts and not (weights.gate and name == FORMAT):
            raise ConfigError(
                f"the task scores {name!r} for role {role!r}, which {where} does not weigh: "
                f"set {where}.{name} (0: known, not paid)"
            )


def check_scores(role: str, weights: RewardConfig, scores: Mapping[str, float]) -> None:
    """check_names() of one trajectory. An invalid one may lack the scores that cannot change its reward."""
    names = set(scores)
    if is_gated(weights, scores):
        names |= weights.parts.keys() - set(_OUTCOMES)
    check_names(role, weights, names)


def _outcome(role: str) -> str:
    return _OUTCOMES[role != MAIN]
