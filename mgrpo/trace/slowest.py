"""The slowest rollouts, turns and tool calls of a window."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from mgrpo.record.spans import Span


def slowest(spans: Mapping[str, Sequence[Span]], kind: str, n: int = 10) -> list[tuple[str, Span]]:
    """(process, span) of the n longest spans of a kind, longest first; of equal ones the earlier first. spans: process
    -> its spans, as of SpanReader.spans()."""
    found = ((process, span) for process, own in spans.items() for span in own if span.kind == kind)
    return heapq.nsmallest(n, found, key=lambda f: (f[1].start - f[1].end, f[1].start, f[0]))
