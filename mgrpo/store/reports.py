"""What a run's reports say in numbers: each is checked before anything is made of it.

Whoever takes part in a run may report, so a report may have another version's form, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from mgrpo.store.records import Reported

MALFORMED = "malformed"  # the kind of what stands in for a report that cannot be read


class _Other(msgspec.Struct):
    step: int = 0


class _Step(msgspec.Struct):
    role: str
    step: int
    metrics: dict[str, float]


class _Sft(msgspec.Struct):
    role: str
    step: int
    steps: int
    loss: float


class _Rollouts(msgspec.Struct):
    step: int
    metrics: dict[str, float]


class _Eval(msgspec.Struct):
    step: int
    split: str
    n: int
    greedy: float
    sampled: float
    d_k: dict[str, dict[str, int]]


class _EvalSet(msgspec.Struct):
    step: int
    split: str
    mode: str
    n: int
    repeats: int
    avg: float
    stderr: float | None
    failed: int
    tags: dict[str, float]


class _StartValidation(msgspec.Struct):
    valid: bool
    text: str


_FORMS = {
    "step": _Step,
    "sft": _Sft,
    "rollouts": _Rollouts,
    "eval": _Eval,
    "eval_set": _EvalSet,
    "start_validation": _StartValidation,
}


def checked(report: Reported) -> Reported:
    """The report, or one of kind MALFORMED that says what is wrong with it."""
    try:
        msgspec.convert(report.payload, _FORMS.get(report.kind, _Other))
    except msgspec.ValidationError as error:
        text = f"report {report.seq} of {report.source} ({report.kind!r}) is malformed: {error}"
        return Reported(report.seq, report.source, MALFORMED, {"text": text})
    return report


def values_of(kind: str, payload: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """(step, metrics) of one report; a report that is only about itself has none."""
    step = int(payload.get("step", 0))
    if kind in ("step", "rollouts"):
        return step, dict(payload["metrics"])
    if kind == "sft":  # it ends where RL begins, at step 0
        return step - payload["steps"], {f"{payload['role']}/sft/loss": payload["loss"]}
    if kind == "eval":
        return step, {f"eval/{payload['split']}/{m}": payload[m] for m in ("sampled", "greedy")}
    if kind == "eval_set":
        named = {"avg": payload["avg"], "stderr": payload["stderr"], "failed": float(payload["failed"])}
        named |= {f"{tag}/avg": value for tag, value in payload["tags"].items()}
        return step, {f"eval/{payload['split']}/{m}": v for m, v in named.items() if v is not None}
    if kind == "start_validation":
        return step, {"start_validation/valid": float(payload["valid"])}
    return step, {}


MAX_NAMES = 5000
"""Metrics whose newest value is kept; a run has a few hundred."""


class NewestValues:
    """The newest value of every metric that a run has reported, and the newest step of each role. take() is for one
    thread; any other may read what it leaves."""

    def __init__(self) -> None:
        self.values: Mapping[str, float] = {}
        """By the names of metrics.jsonl."""
        self.steps: Mapping[str, int] = {}
        """By role, of its newest report of a step."""
        self.left_out = 0
        """Values of further names, beyond MAX_NAMES."""
        self._seq = 0

    def take(self, reports: Sequence[Reported]) -> None:
        """reports: the store's, oldest first, also those that were taken before."""
        fresh: list[Reported] = []
        for number in range(len(reports) - 1, -1, -1):
            if reports[number].seq <= self._seq:
                break
            fresh.append(reports[number])
        if not fresh:
            return
        values, steps = dict(self.values), dict(self.steps)
        for report in reversed(fresh):
            found = checked(report)
            step, named = values_of(found.kind, found.payload)
            if found.kind == "step":
                steps[str(found.payload["role"])] = step
            for name, value in named.items():
                if name in values or len(values) < MAX_NAMES:
                    values[name] = value
                else:
                    self.left_out += 1
        self._seq = fresh[0].seq
        self.values, self.steps = values, steps
