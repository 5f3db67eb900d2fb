"""Where a trainer's time goes on its main thread: one measurement for the spans of the record and the metrics time/*.

    clock.start()                      the first step begins
    with clock.part("apply"): ...      or clock.begin("train") ... clock.finish("train")
    seconds = clock.end(step)          the step ends, the next one begins

A part that runs within another one (the record of the step before is waited for while a checkpoint is committed) is a
span within its span, and its seconds are its own alone: the parts of a step never add up to more than the step. A part
that is open when the step ends is divided there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mgrpo.record import spans

METRICS = {
    "wait": "wait_batch",
    "train": "train",
    "apply": "apply",
    "publish": "weights",
    "checkpoint": "checkpoint",
    "report": "record",
}
"""Kind of a part's span -> its metric, time/<name>."""


@dataclass(slots=True)
class _Open:
    kind: str
    name: str
    start: int
    args: spans.Args = field(default_factory=dict)


class StepClock:
    """For the trainer's main thread. name: of the spans, the policy's role."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._step_start: int | None = None  # ns by spans.now()
        self._open: list[_Open] = []  # the innermost is last
        self._mark = 0  # until when the seconds are accounted for
        self._ns = dict.fromkeys(METRICS, 0)

    @property
    def running(self) -> bool:
        """start() was called."""
        return self._step_start is not None

    def start(self) -> None:
        """The first step begins. What parts took before is no step's."""
        self._step_start = self._mark = spans.now()
        self._ns = dict.fromkeys(METRICS, 0)

    def inside(self, kind: str) -> bool:
        """Whether the innermost open part is of this kind."""
        return bool(self._open) and self._open[-1].kind == kind

    def begin(self, kind: str, args: spans.Args | None = None) -> None:
        """A part begins, within the one that is open."""
        now = self._account()
        self._open.append(_Open(kind, self._name, now, args or {}))

    def finish(self, kind: str, args: spans.Args | None = None) -> None:
        """The innermost part ends; nothing where it is of another kind. args: further ones of its span."""
        if self.inside(kind):
            now, part = self._account(), self._open.pop()
            spans.add(kind, part.name, spans.MAIN_LANE, part.start, now, part.args | (args or {}))

    @contextlib.contextmanager
    def part(self, kind: str, args: spans.Args | None = None) -> Iterator[None]:
        """begin(), and finish() whatever the block raises."""
        self.begin(kind, args)
        try:
            yield
        finally:
            self.finish(kind)

    def end(self, step: int) -> dict[str, float]:
        """Step number `step` ends and the next one begins. Seconds of the whole ("step"), of each part by the name of
        its metric, and of the rest ("other")."""
        assert self._step_start is not None
        now, start = self._account(), self._step_start
        for part in reversed(self._open):
            spans.add(part.kind, part.name, spans.MAIN_LANE, part.start, now, part.args)
            part.start = now
        spans.add("step", self._name, spans.MAIN_LANE, start, now, {"step": step})
        ns, self._ns, self._step_start = self._ns, dict.fromkeys(METRICS, 0), now
        seconds = {METRICS[kind]: taken / 1e9 for kind, taken in ns.items()}
        return {"step": (now - start) / 1e9, **seconds, "other": (now - start - sum(ns.values())) / 1e9}

    def _account(self) -> int:
        """Give the time since the last change to the innermost part; returns now."""
        now = spans.now()
        if self._open:
            self._ns[self._open[-1].kind] += now - self._mark
        self._mark = now
        return now
