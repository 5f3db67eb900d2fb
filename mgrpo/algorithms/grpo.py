"""GRPO (arXiv 2402.03300) with a team reward: every trajectory of a rollout, whichever role it belongs to, gets the
advantage of the rollout.

    A(k, i) = (R(k) - mu) / (std + eps)

R(k) is the main agent's reward; mu and std are over the rollouts of the group that ended, each counted once, with or
without an invocation of this role. The role's own scores are measured and not paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mgrpo.algorithms.base import Algorithm, GroupRollout, RolloutGroup
from mgrpo.algorithms.statistics import Moments
from mgrpo.types import Float32


class Grpo(Algorithm):
    def reward(self, scores: Mapping[str, float], rollout: GroupRollout) -> float:
        return rollout.reward

    def advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        rows = [(r.reward, n) for n, g in enumerate(groups) for r in g.rollouts if r.ok]
        rewards, group = np.array(rows, np.float64).reshape(-1, 2).T
        moments = Moments(rewards, np.ones_like(rewards), group.astype(np.int64), len(groups))
        scale = moments.deviation + moments.scaled(self.settings.eps)

        def advantage(reward: float, n: int) -> float:
            gap = np.ldexp(reward, -moments.exponent[n]) - moments.mean[n]
            return float(gap / scale[n]) if moments.varied[n] else 0.0

        return [[advantage(m.reward, n) for m in g.members] for n, g in enumerate(groups)]
