"""Leave-one-out credit of calls: an invocation is compared with the calls of the group that its rollout had no part in.

    A(k, i) = R(k, i) - b(k)      b(k) = sum over j != k of sum_l R(j, l)  /  sum over j != k of d_j

The baseline is the mean reward of all calls of the role in the other rollouts of the group, each call counted once,
whatever the alignment keeps of it. `rloo` leaves out one trajectory: the siblings of a call, which serve the same
rollout and share its outcome, stay in its baseline. Here they leave with it, so the baseline does not depend on what
this rollout did, and a rollout that calls often has no say in its own measure. With the outcome as the only part of the
reward, A is the rollout's outcome less the mean outcome of the other rollouts, weighted by their calls.

A(k, i) = 0 where no other rollout has a call, and in a group whose rewards are equal but for rounding (EQUAL_WITHIN in
statistics.py). For a role with one trajectory a rollout it is `rloo` on the reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mgrpo.algorithms.base import Algorithm, RolloutGroup
from mgrpo.algorithms.statistics import EQUAL_WITHIN
from mgrpo.types import Float32


class LeaveOneOutCall(Algorithm):
    def advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        return [_group(group) for group in groups]


def _group(group: RolloutGroup) -> list[float | Float32]:
    rewards = [m.reward for m in group.members]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    if high - low <= EQUAL_WITHIN * max(abs(low), abs(high)):
        return [0.0] * len(rewards)
    baselines: dict[int, float | None] = {}
    for rollout in {m.rollout.rollout for m in group.members}:
        others = [m.reward for m in group.members if m.rollout.rollout != rollout]
        baselines[rollout] = math.fsum(others) / len(others) if others else None
    return [_difference(m.reward, baselines[m.rollout.rollout]) for m in group.members]


def _difference(reward: float, baseline: float | None) -> float:
    return 0.0 if baseline is None else reward - baseline
