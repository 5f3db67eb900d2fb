"""Metrics of a run: one JSON line a record, and the same to the sinks that the config names (mgrpo/sinks).

Names are `<agent>/<group>/<name>` (main/reward/mean, sub/align/dup_ratio, store/depth); see docs/metrics.md.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from mgrpo.sinks.base import MetricSink

WAITING = 20_000  # lines that are held for a disk that takes none


class MetricsWriter:
    """Appends to <folder>/metrics.jsonl, and writes to sinks.

    A record is {"step": int, "time": seconds since the run began, name: number, ...}; non-finite numbers are written as
    null, since JSON has none. A disk that takes nothing is reported, never raised: the lines wait for the next write
    that it takes.
    """

    def __init__(
        self,
        folder: Path,
        report: Callable[[str], None],
        sinks: Mapping[str, MetricSink] = MappingProxyType({}),
    ) -> None:
        """report: takes one line when something is not written, and when it is written again. sinks: by name; the
        writer closes them, and goes on without one that fails."""
        self._path, self._report = folder / "metrics.jsonl", report
        self._file = -1
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._refused = False
        self._flush()
        self._sinks = dict(sinks)

    def write(self, step: int, seconds: float, values: Mapping[str, float], seq: int | None = None) -> None:
        """seq: number of the report that the record was made of; for the file alone."""
        record: dict[str, float | None] = {"step": step, "time": round(seconds, 3)}
        record |= {"seq": seq} if seq is not None else {}
        record |= {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._waiting.append(json.dumps(record).encode() + b"\n")
        self._flush()
        for name in list(self._sinks):
            with self._without_a_failing(name):
                self._sinks[name].write(step, values)

    def close(self) -> None:
        """Idempotent."""
        self._flush()
        if self._waiting:
            self._report(f"{self._path}: {len(self._waiting)} lines were not written")
            self._waiting.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for name in list(self._sinks):
            with self._without_a_failing(name):
                self._sinks[name].close()
        self._sinks.clear()

    def _flush(self) -> None:
        try:
            if self._file < 0:
                self._file = _opened(self._path)
            while self._waiting:
                _append(self._file, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._refused:
                self._report(f"{self._path}: not written: {error.strerror}; its lines wait for the disk")
            self._refused = True
            return
        if self._refused:
            self._report(f"{self._path}: written again")
        self._refused = False

    @contextlib.contextmanager
    def _without_a_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a library, a server or a file system that is not ours
            self._sinks.pop(name, None)
            self._report(f"metrics go on without {name}: {error}")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> int:
    """The file for appending. A killed process may have left a line without its end: it is cut, since the next line
    would be glued to it (the store still has the report it was made from)."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        at = size = os.fstat(file).st_size
        while at > 0:
            block = os.pread(file, min(at, 1 << 16), at - min(at, 1 << 16))
            at -= len(block)
            if (end := block.rfind(b"\n")) >= 0:
                at += end + 1
                break
        if at < size:
            os.ftruncate(file, at)
    except BaseException:
        os.close(file)
        raise
    return file


def _append(file: int, line: bytes) -> None:
    """All of it or nothing. Raises OSError."""
    at = os.fstat(file).st_size
    try:
        while line:
            line = line[os.write(file, line) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, at)
        raise


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of a run in order of writing: {"step": int, "time": float, name: number or None, ...}. A line that is
    none of them (torn by a crash, or damaged) is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if _is_record(record):
            yield record


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record.get("time") is None:
        return False
    return all(v is None or (isinstance(v, int | float) and abs(v) < math.inf) for v in record.values())
