"""Whether an engine's log-probs of a version's probe are the trainer's, up to rounding.

How far an engine that is right may be off is bounded for three quarters of the probe's tokens, on average (TOLERANCE),
and four times as far for all: rare tokens' log-probs round much worse than others'. docs/engines.md says what was
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mgrpo.types import Probe

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # nats, by what the engine computes in


@dataclass(frozen=True, slots=True)
class Gap:
    """How far an engine's log-probs of a probe are from the trainer's, in nats. typical: mean of the smaller three
    quarters."""

    typical: float
    mean: float
    largest: float

    @classmethod
    def between(cls, theirs: Sequence[float], probe: Probe) -> Gap:
        gaps = np.sort(np.abs(np.asarray(theirs) - np.asarray(probe.logprobs)))
        return cls(float(gaps[: len(gaps) - len(gaps) // 4].mean()), float(gaps.mean()), float(gaps[-1]))

    def within(self, tolerance: float) -> bool:
        return self.typical <= tolerance and self.mean <= 4 * tolerance  # false where one is NaN

    def words(self, tolerance: float) -> str:
        return (
            f"log-probs of a fixed prompt differ by {self.mean:.2g} nats on average, {self.largest:.2g} at most, from "
            f"the trainer's ({self.typical:.2g} in the nearer three quarters, bound {tolerance:g})"
        )
