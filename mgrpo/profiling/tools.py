"""The profilers that a window opens: what each starts, stops and writes.

torch     operators and kernels in Chrome's trace format, <name>.json.gz, and the longest as a table, <name>.txt
nsys      the capture range of `nsys profile`, under which the process runs (run/nsys.py); nsys writes the file itself
memory    the history of allocations on the GPU, <name>.pickle, for https://pytorch.org/memory_viz

nsys and memory have not yet been run on a GPU.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from mgrpo.config.profile import ProfileConfig
from mgrpo.profiling.stages import PREFIX

TABLE_ROWS = 40
ALLOCATIONS = 1_000_000  # of a memory history: the newest are kept
MEMORY_VIEW = "https://pytorch.org/memory_viz"


class Profiler(ABC):
    """One window's. start() and stop() come once each, from one thread, and may raise what their library does."""

    def range(self, name: str) -> AbstractContextManager[object]:
        """How it shows a stage."""
        return contextlib.nullcontext()

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self, folder: Path, name: str) -> str:
        """Write the files <folder>/<name>.* into a folder that is there, and look no longer, whatever it raises. Says
        where they are and how to read them, for people."""


class TorchProfiler(Profiler):
    """torch.profiler, over the CPU and, where there is one, the GPU."""

    def __init__(self, with_stack: bool) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            record_shapes=True,
            profile_memory=True,
            with_stack=with_stack,
            acc_events=True,  # of the whole window; torch warns where this is not said
        )

    def range(self, name: str) -> AbstractContextManager[object]:
        range_: AbstractContextManager[object] = torch.profiler.record_function(name)
        return range_

    def start(self) -> None:
        self._profile.start()

    def stop(self, folder: Path, name: str) -> str:
        self._profile.stop()
        trace, table = folder / f"{name}.json.gz", folder / f"{name}.txt"
        raw = folder / f".{name}.json"
        try:
            self._profile.export_chrome_trace(str(raw))
            _compress(raw, trace)
        finally:
            raw.unlink(missing_ok=True)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        events = self._profile.key_averages()
        table.write_text(_stages(events) + events.table(sort_by=by, row_limit=TABLE_ROWS), encoding="utf-8")
        return f"{trace} (opens in https://ui.perfetto.dev), longest operators in {table.name}"


def _stages(events: Any) -> str:
    """A line for each stage, the longest first. A stage that lies within another counts in both."""
    found = sorted((e for e in events if e.key.startswith(PREFIX)), key=lambda e: -e.cpu_time_total)
    rows = [f"{e.key:<24}{e.count:>8}{e.cpu_time_total / 1e3:>14.1f}" for e in found]
    return "\n".join([f"{'stage':<24}{'calls':>8}{'host ms':>14}", *rows, "", ""])


def _compress(raw: Path, trace: Path) -> None:
    """Raises OSError also where torch could not write all of `raw`, which it does not say."""
    with raw.open("rb") as file:
        file.seek(max(0, raw.stat().st_size - 64))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{raw.name}: not written to its end; is the disk full?")
        file.seek(0)
        part = trace.with_name(f"{trace.name}.part")
        try:
            with gzip.open(part, "wb", compresslevel=4) as out:
                shutil.copyfileobj(file, out, 1 << 20)
            part.replace(trace)
        finally:
            part.unlink(missing_ok=True)


class NsysRange(Profiler):
    """The capture range of nsys, and stages as NVTX ranges."""

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        _cuda().nvtx.range_push(name)
        try:
            yield
        finally:
            _cuda().nvtx.range_pop()

    def start(self) -> None:
        _cuda().profiler.start()

    def stop(self, folder: Path, name: str) -> str:
        _cuda().profiler.stop()
        return f"nsys has what it captured, and writes it to {folder}"


class MemoryHistory(Profiler):
    """Allocations on this process's GPU, with their stacks."""

    def start(self) -> None:
        _cuda().memory._record_memory_history(max_entries=ALLOCATIONS)

    def stop(self, folder: Path, name: str) -> str:
        snapshot = folder / f"{name}.pickle"
        try:
            _cuda().memory._dump_snapshot(str(snapshot))
        finally:
            _cuda().memory._record_memory_history(enabled=None)
        return f"{snapshot} (opens in {MEMORY_VIEW})"


def _cuda() -> Any:
    return torch.cuda  # whose functions here have no types


def open_profiler(config: ProfileConfig) -> Profiler:
    """The one that the config names."""
    if config.tool == "torch":
        return TorchProfiler(config.with_stack)
    return NsysRange() if config.tool == "nsys" else MemoryHistory()
