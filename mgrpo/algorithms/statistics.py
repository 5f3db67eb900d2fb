"""Weighted statistics of rewards within groups, the common part of the group-relative algorithms.

    mu = sum w R / sum w      var = sum w (R - mu)^2 / sum w

In float64. Choices of ours: 1. The variance is the population's, so that a weight of m / D_max equals m copies. 2. A
group of one, and a group whose rewards are equal, get exactly 0; equal means max - min <= EQUAL_WITHIN * max |R|, since
the same parts added up in another order differ by a few ulp of float32. 3. Moments are taken of rewards divided by a
power of two, the group's own: no square overflows or vanishes, and ordinary numbers keep their bits. 4. Sums run in the
order of the rows, so a group's numbers do not depend on the groups beside it.

The same formulas stand in mgrpo.ops.group_advantage, whose reference adds terms rounded to a grid, so that no order of
the rows changes a bit on any backend. In float64 that is another last bit: of the rows of 30,000 random groups (one
member, equal rewards and weights of 0 among them) a third has the same one, and all have the same float32. Recorded
runs are replayed bit for bit in float64, so the two stay apart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mgrpo.algorithms.base import Algorithm, RolloutGroup
from mgrpo.types import Float32

EQUAL_WITHIN = 8 * 2.0**-23
"""Rewards of a group that differ by no more than this part of the largest are equal; mgrpo.group_advantage has the same
number."""

LARGEST_REWARD = 1.7014118e38
"""Rewards beyond it are refused: the difference of two must fit a float32 advantage."""

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Moments:
    """Moments of G groups, and n rows relative to them. Unless said otherwise in units of the group's own 2^exponent.

    exponent i32 (G,); total (G,): sum of weights; mean, deviation (G,); varied bool (G,): the rewards are not equal;
    gap (n,): reward less the group's mean; rewards, weights, group (n,) and unbiased: as they were given.
    """

    def __init__(
        self, rewards: Float64, weights: Float64, group: Int64, count: int, unbiased: bool = False
    ) -> None:
        """rewards, weights > 0 and the group's number in [0, count) of n rows. unbiased: the deviation is the sample's,
        as mgrpo.group_advantage defines it. Raises ValueError naming a reward."""
        for reward in rewards[~(np.abs(rewards) <= LARGEST_REWARD)]:
            bound = f"is beyond {LARGEST_REWARD}, half of what a float32 holds"
            raise ValueError(f"reward {reward} {bound if np.isfinite(reward) else 'is not finite'}")
        self.rewards, self.weights, self.group, self.unbiased = rewards, weights, group, unbiased
        size = np.bincount(group, minlength=count)
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(low, group, rewards)
        np.maximum.at(high, group, rewards)
        low[size == 0] = high[size == 0] = 0.0
        magnitude = np.maximum(np.abs(low), np.abs(high))
        self.varied = (size > 1) & (high - low > EQUAL_WITHIN * magnitude)
        self.exponent = np.frexp(magnitude)[1]
        scaled = np.ldexp(rewards, -self.exponent[group])
        self.total = np.bincount(group, weights, count)
        some = np.where(size > 0, self.total, 1.0)
        self.mean = np.bincount(group, weights * scaled, count) / some
        self.gap = scaled - self.mean[group]
        square = np.bincount(group, weights * self.gap * self.gap, count) / some
        if unbiased:
            spare = self.total - np.bincount(group, weights * weights, count) / some
            square = np.where(spare > 0, square * some / np.where(spare > 0, spare, 1.0), np.inf)
        self.deviation = np.where((size > 1) & (low != high), np.sqrt(square), 0.0)

    def scaled(self, number: float) -> Float64:
        """A number in the units of each group (G,)."""
        return np.asarray(np.ldexp(number, -self.exponent))

    def unscaled(self, rows: Float64) -> Float64:
        """Rows (n,) in the units of the rewards."""
        return np.asarray(np.ldexp(rows, self.exponent[self.group]))

    def normalized(self, eps: float) -> Float64:
        """(R - mu) / (std + eps) of the rows (n,); in groups that are not varied the numbers mean nothing."""
        return np.asarray(self.gap / (self.deviation + self.scaled(eps))[self.group])


def moments_of(groups: Sequence[RolloutGroup]) -> Moments:
    """Of the rewards of the kept members (weight > 0): by group, in order."""
    rows = [(m.reward, m.weight, n) for n, g in enumerate(groups) for m in g.members if m.weight > 0]
    rewards, weights, group = np.array(rows, np.float64).reshape(-1, 3).T
    return Moments(rewards, weights, group.astype(np.int64), len(groups))


def group_statistics(groups: Sequence[RolloutGroup]) -> tuple[list[float], list[float]]:
    """Weighted mean and standard deviation of the kept rewards of each group; 0 in a group without any."""
    moments = moments_of(groups)
    mean, std = (np.ldexp(x, moments.exponent) for x in (moments.mean, moments.deviation))
    return mean.tolist(), std.tolist()


class GroupRelative(Algorithm):
    """An algorithm that compares each kept trajectory's reward with those of its group; see `relative`."""

    @abstractmethod
    def relative(self, moments: Moments) -> Float64:
        """The formula: advantages (n,) of the rows. What it gives in groups that are not varied is not used."""

    def rows(self, moments: Moments) -> Float64:
        """Advantages (n,) of the rows: the formula's, and 0 in groups that are not varied."""
        with np.errstate(all="ignore"):
            rows = self.relative(moments)
        return np.where(moments.varied[moments.group], rows, 0.0)

    def advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        values = iter(self.rows(moments_of(groups)).tolist())
        return [[next(values) if m.weight > 0 else 0.0 for m in g.members] for g in groups]
