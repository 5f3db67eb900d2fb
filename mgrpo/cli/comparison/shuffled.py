"""The control "shuffled rewards": M-GRPO on rewards that are permuted within each group, so nothing can be learned."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mgrpo.algorithms.base import RolloutGroup
from mgrpo.algorithms.mgrpo import MGrpo
from mgrpo.config.algorithm import MGrpoAlgorithm
from mgrpo.config.reward import RewardConfig
from mgrpo.types import Float32


class ShuffledRewards(MGrpo):
    """options: { seed = 1 }."""

    def __init__(self, options: Mapping[str, int], role: str, weights: RewardConfig) -> None:
        super().__init__(MGrpoAlgorithm(), role, weights)
        self._seed = options["seed"]

    def advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        return super().advantages([self.permuted(group) for group in groups])

    def permuted(self, group: RolloutGroup) -> RolloutGroup:
        """The same trajectories with each other's rewards: a pure function of (seed, query, role)."""
        place = zlib.crc32(f"{group.query}/{self.role}".encode())
        order = np.random.default_rng([self._seed, place]).permutation(len(group.members))
        rewards = [group.members[i].reward for i in order]
        members = [replace(m, reward=r) for m, r in zip(group.members, rewards, strict=True)]
        return replace(group, members=members)
