"""Signs that a run goes wrong although nothing fails, said in time.

One so far, measured on runs that stalled (docs/results.md): the team learns the training questions by heart. Those are
answered better and better, the questions of the validation split are not. From the second evaluation on, a run that
stalled was right to .40, .53, .61 in training and to .18, .15, .23 in validation; in one that learned, the two were
never more than .02 apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mgrpo.types import MAIN

GAP = 0.2
"""Least accuracy that training questions must be ahead by; validation must be below half of theirs, too."""
NOISE = 1.5
"""An evaluation of n questions is off by up to NOISE / sqrt(n): three standard errors."""


class Signs:
    """Watches the reports of one run."""

    def __init__(self) -> None:
        self._correct: dict[int, float] = {}  # step -> accuracy of its rollouts
        self._evaluated = 0  # step of the last evaluation

    def take(self, kind: str, payload: Mapping[str, Any]) -> str | None:
        """One report in the order of the run; a line that names the sign where there is one."""
        step = int(payload.get("step", 0))
        if kind == "step" and (correct := payload["metrics"].get(f"{MAIN}/reward/correct")) is not None:
            self._correct[step] = float(correct)
        if kind != "eval" or payload["split"] != "validation":
            return None
        since, self._evaluated = self._evaluated, step
        trained = [value for s, value in self._correct.items() if since < s <= step]
        if not trained:
            return None
        training, validation = sum(trained) / len(trained), float(payload["sampled"])
        bound = max(GAP, NOISE / math.sqrt(payload["n"]))
        if training - validation <= bound or validation >= training / 2:
            return None
        return (
            f"step {step}: {training:.2f} of the training rollouts since step {since} were right, but {validation:.2f} "
            f"of the validation questions: what is learned does not carry over to other questions "
            f"(docs/results.md, 'A policy that learns by heart')"
        )
