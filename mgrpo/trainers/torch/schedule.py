"""The learning rate of each step: linear warm-up, constant, then a fall to 0 over the last part.

A function of the step alone, so that a trainer that goes back to a checkpoint needs nothing but its number.
"""

from __future__ import annotations

import math
from typing import Protocol


class Shape(Protocol):
    """What OptimizerConfig and SftConfig say of how it rises and falls."""

    @property
    def warmup_steps(self) -> int: ...

    @property
    def decay(self) -> float: ...

    @property
    def decay_shape(self) -> str: ...


class Schedule(Shape, Protocol):
    """A shape with its highest value."""

    @property
    def lr(self) -> float: ...


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """lr of step 0 .. steps - 1; that of the last step is not yet 0."""
    return schedule.lr * share_of_lr(schedule, step, steps)


def share_of_lr(shape: Shape, step: int, steps: int) -> float:
    """The factor of the highest learning rate, in (0, 1]."""
    rise = min(1.0, (step + 1) / shape.warmup_steps) if shape.warmup_steps else 1.0
    tail = shape.decay * steps
    fall = min(1.0, (steps - step) / tail) if tail else 1.0
    if shape.decay_shape == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * fall)
    return min(rise, fall)
