"""The metric sink interface: where a run's metrics go beside metrics.jsonl, which is always written.

A sink may fail at any time without ending anything: the run reports it in one line and goes on without that sink.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink may say of a run. folder: the run's; config: its resolved settings, as JSON types."""

    folder: Path
    project: str
    name: str
    config: Mapping[str, Any]


class MetricSink(ABC):
    """Made in the launcher when the run begins, and again when it is resumed. The constructor takes a RunInfo and may
    raise ImportError where its library is not installed."""

    @abstractmethod
    def __init__(self, run: RunInfo) -> None: ...

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of one report, by name (docs/metrics.md). Reports of different agents come in any order, so `step` is
        not monotonic; values may be infinite or NaN."""

    def close(self) -> None:  # noqa: B027 - optional
        """Nothing more comes. Idempotent."""
