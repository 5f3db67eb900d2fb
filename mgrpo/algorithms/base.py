"""The algorithm interface: what the trajectories of one role are worth to its policy.

    scores -> reward() -> alignment draws and weights -> advantages() -> packing -> loss

Batcher, loss and trainer know nothing of it: they get a number for each trajectory, or for each token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mgrpo.config.reward import RewardConfig
from mgrpo.credit import trajectory_reward
from mgrpo.types import Float32, Int32, UInt8


@dataclass(frozen=True, slots=True)
class GroupRollout:
    """One of the K rollouts of a group. reward: the main agent's. d_k: sub-agent role -> invocations. A rollout that
    failed (ok False) has no reward: its numbers are 0, and it has no members."""

    rollout: int
    ok: bool
    correct: float
    reward: float
    d_k: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One trajectory of the role: L tokens, of all its segments. weight: w(k, i) of the alignment, all copies together;
    0 where the draw dropped it, and then its advantage is not read."""

    rollout: GroupRollout
    invocation: int
    scores: Mapping[str, float]
    reward: float
    weight: float
    tokens: Int32  # (L,)
    loss_mask: UInt8  # (L,)
    segment_starts: tuple[int, ...] = (0,)

    def turns(self) -> list[tuple[int, int]]:
        """[first, last) of each stretch of sampled tokens. Each lies in one segment, which begins with context."""
        edges = np.flatnonzero(np.diff(self.loss_mask != 0, prepend=False, append=False))
        return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The K rollouts of one query, and the trajectories of one role in them, by rollout and invocation."""

    query: str
    k: int
    rollouts: Sequence[GroupRollout]
    members: Sequence[GroupMember]


class Algorithm(ABC):
    """One role's algorithm. Pure: the same groups give the same numbers, or a run could not be replayed."""

    per_token: ClassVar[bool] = False
    """Whether advantages() gives every token one of its own."""

    def __init__(self, settings: Any, role: str, weights: RewardConfig) -> None:
        """settings: `agents.<role>.algorithm`; of a class from outside its `options`. weights: `agents.<role>.reward`,
        in a curriculum as one stage has it: reward() is asked of the instance of the group's stage, advantages() of the
        first stage's, since the groups of one step may be of two stages. Raises ValueError naming a setting that it
        cannot work with."""
        self.settings, self.role, self.weights = settings, role, weights

    def reward(self, scores: Mapping[str, float], rollout: GroupRollout) -> float:
        """Reward of one trajectory with these scores: the paper's hierarchical credit (mgrpo/credit.py)."""
        return trajectory_reward(self.role, self.weights, scores, rollout.correct)

    @abstractmethod
    def advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        """Advantages of the members of each group, in their order: a finite number each, with per_token f32[L] aligned
        with the tokens, of which those with loss_mask 0 are not read. groups: those of one optimizer step."""
