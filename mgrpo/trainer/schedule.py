"""The learning rate of each step: linear warm-up, constant, then a fall to 0 over the last part.

A function of the step alone, so that a trainer that goes back to a checkpoint needs nothing but its number.
"""

from __future__ import annotations

import math
from typing import Protocol


class Schedule(Protocol):
    """What OptimizerConfig and WarmStartConfig say of it."""

    @property
    def lr(self) -> float: ...

    @property
    def warmup_steps(self) -> int: ...

    @property
    def decay(self) -> float: ...

    @property
    def decay_shape(self) -> str: ...


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """lr of step 0 .. steps - 1; that of the last step is not yet 0."""
    rise = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    tail = schedule.decay * steps
    fall = min(1.0, (steps - step) / tail) if tail else 1.0
    if schedule.decay_shape == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * fall)
    return schedule.lr * min(rise, fall)
