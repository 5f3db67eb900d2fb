"""The stages of a training step: forward, head, backward, reduce, optimizer, and what else is named.

    with stage("forward"):
        hidden = ...

A stage is a span of the process's record (record/spans.py) and, while a profiler looks (window.py), a range of it.
Where nobody looks it is one look at two variables. On a GPU the span is the host's time, which launches the work; when
the device did it is in the profiler's trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from mgrpo.record import spans

PREFIX = "mgrpo/"  # of the ranges that a profiler shows, beside those of its own

Ranges = Callable[[str], AbstractContextManager[object]]

_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()
_ranges: Ranges | None = None


def stage(name: str) -> AbstractContextManager[object]:
    """A context manager around one stage of the step."""
    if _ranges is not None:
        return _both(name, _ranges)
    return spans.span("stage", name) if spans.recording() else _NOTHING


def mark(name: str) -> AbstractContextManager[object]:
    """A context manager around what is no stage of a step, or has a span of another kind: a range of the profiler
    alone."""
    return _NOTHING if _ranges is None else _ranges(PREFIX + name)


def show_to(ranges: Ranges | None) -> None:
    """Stages and marks of this process are ranges of a profiler from now on; None: of none. ranges(name): a context
    manager around one."""
    global _ranges
    _ranges = ranges


@contextlib.contextmanager
def _both(name: str, ranges: Ranges) -> Iterator[None]:
    with ranges(PREFIX + name), spans.span("stage", name):
        yield
