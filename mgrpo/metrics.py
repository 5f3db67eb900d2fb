"""Metrics of a run: one JSON line a record for machines, tensorboard for people who use it.

Names are `<agent>/<group>/<name>` (main/reward/mean, sub/align/dup_ratio, store/depth); see docs/metrics.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsWriter:
    """Appends to <folder>/metrics.jsonl and, where tensorboard is installed, to <folder>/tensorboard.

    A record is {"step": int, "time": seconds since the run began, name: number, ...}; non-finite numbers are written as
    null, since JSON has none.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from tensorboard.summary import Writer
        except ImportError:
            return  # an extra: the JSON lines hold everything
        self._board = Writer(str(folder / "tensorboard"))

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        record: dict[str, float | None] = {"step": step, "time": round(seconds, 3)}
        record |= {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run in order of writing; a torn last line (a killed run) is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
