"""Reading a run's reports: all that the store has, page by page, and each checked before anything is made of it.

Whoever takes part in a run may report, so a report may have another version's form, or none. Such a one is passed on as
a line for people that names it; it never ends who reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from mgrpo.store.client import StoreClient
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


def every_report(client: StoreClient, after: int) -> Iterator[Reported]:
    """The reports with a number beyond `after` that the store has now, in order."""
    while page := client.reports(after=after):
        yield from map(checked, page)
        after = page[-1].seq


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
