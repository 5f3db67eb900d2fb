"""The slowest rollouts, turns and tool calls of a window, and how far they are from the usual one."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgrpo.record.spans import Span


def slowest(spans: Mapping[str, Sequence[Span]], kind: str, n: int = 10) -> list[tuple[str, Span]]:
    """(process, span) of the n longest spans of a kind, longest first; of equal ones the earlier first. spans: process
    -> its spans, as of SpanReader.spans()."""
    found = ((process, span) for process, own in spans.items() for span in own if span.kind == kind)
    return heapq.nsmallest(n, found, key=lambda f: (f[1].start - f[1].end, f[1].start, f[0]))


@dataclass(frozen=True, slots=True)
class Tail:
    """How long the spans of one kind took, in seconds; percentiles are of the spans themselves, none is made up."""

    n: int
    total: float
    p50: float
    p90: float
    p99: float
    longest: float


def tail(spans: Mapping[str, Sequence[Span]], kind: str) -> Tail | None:
    """The tail latency of a kind; None where there is no span of it."""
    took = sorted((s.end - s.start) / 1e9 for own in spans.values() for s in own if s.kind == kind)
    if not took:
        return None

    def at(share: float) -> float:
        return took[min(len(took) - 1, int(share * len(took)))]

    return Tail(len(took), sum(took), at(0.5), at(0.9), at(0.99), took[-1])
