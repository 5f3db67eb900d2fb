"""The stages of a training step: forward, head, backward, reduce, optimizer, and what else is named.

    with stage("forward"):
        hidden = ...

A stage is a span of the process's record (record/spans.py) and, while a profiler looks (window.py), a range of it.
Where nobody looks it is one look at two variables. On a GPU the span is the host's time, which launches the work; when
the device did it is in the profiler's trace.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from mgrpo.record import spans

_NOTHING: AbstractContextManager[object] = contextlib.nullcontext()


def stage(name: str) -> AbstractContextManager[object]:
    """A context manager around one stage of the step."""
    return spans.span("stage", name) if spans.recording() else _NOTHING
