"""Credit of each turn, after GiGPO ("Group-in-Group Policy Optimization", arXiv 2505.10978): beside the advantage of
the trajectory, turns that answer the same observation are compared with each other.

    G(k, i, t) = gamma^(T - 1 - t) R(k, i)                        return of turn t of T
    A_turn     = (G - mean) / (std + eps)                         over the turns of the group with the same observation
    A(k, i, t) = (R - mu) / (std + eps) + omega A_turn            for every token that turn t sampled

A turn is a stretch of sampled tokens; its observation is the stretch before it: the prompt for the first turn (of each
segment), what a tool or another agent said for a later one. Turns whose observation nobody shares, and those of equal
return, have A_turn = 0, so where no observation comes twice this is `mgrpo`.

Deviations from the paper: 1. The reward comes at the end only, since a trajectory has no scores of its turns. 2. An
observation is what its tokens are, compared exactly; the paper's environments name their states. 3. Means and
deviations count each trajectory with its weight of the alignment, and the deviation is the population's plus eps.
4. gamma discounts by turns, not by tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from mgrpo.algorithms.base import Algorithm, GroupMember, RolloutGroup
from mgrpo.algorithms.statistics import Float64, Moments, moments_of
from mgrpo.types import Float32


class TurnCredit(Algorithm):
    per_token = True

    def advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        kept = [(n, m) for n, g in enumerate(groups) for m in g.members if m.weight > 0]
        whole = self._normalized(moments_of(groups))
        turns = self.settings.omega * self._normalized(self._turn_moments(kept))
        credit, first = {}, 0
        for (_, member), base in zip(kept, whole, strict=True):
            spans = member.turns()
            row = np.zeros(len(member.tokens), np.float32)
            for (begin, end), extra in zip(spans, turns[first : first + len(spans)], strict=True):
                row[begin:end] = base + extra
            first += len(spans)
            credit[id(member)] = row
        return [
            [credit[id(m)] if m.weight > 0 else np.zeros(len(m.tokens), np.float32) for m in g.members]
            for g in groups
        ]

    def _normalized(self, moments: Moments) -> Float64:
        with np.errstate(all="ignore"):
            rows = moments.normalized(self.settings.eps)
        return np.where(moments.varied[moments.group], rows, 0.0)

    def _turn_moments(self, kept: Sequence[tuple[int, GroupMember]]) -> Moments:
        """Of the returns of all turns, grouped by rollout group and observation."""
        returns: list[float] = []
        weights: list[float] = []
        numbers: list[int] = []
        known: dict[tuple[int, bytes], int] = {}
        for group, member in kept:
            spans = member.turns()
            before = 0
            for turn, (begin, end) in enumerate(spans):
                before = max(before, member.segment_starts[bisect_right(member.segment_starts, begin) - 1])
                observation = (group, member.tokens[before:begin].tobytes())
                numbers.append(known.setdefault(observation, len(known)))
                returns.append(self.settings.gamma ** (len(spans) - 1 - turn) * member.reward)
                weights.append(member.weight)
                before = end
        return Moments(np.array(returns), np.array(weights), np.array(numbers, np.int64), len(known))
