"""`mgrpo trace`: the spans of a run, or of some of its steps, as one Perfetto file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mgrpo.config import load_config
from mgrpo.errors import ConfigError
from mgrpo.record.reader import Recording
from mgrpo.record.span_reader import SpanReader, absent
from mgrpo.record.spans import Span
from mgrpo.trace.arrows import Arrows, find_arrows
from mgrpo.trace.layout import forward
from mgrpo.trace.perfetto import protocol, write_trace

FILE = "trace.pftrace"
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Steps:
    """RL steps that are wanted, from 1 on, both ends included; first None: the last `last` of the record."""

    first: int | None
    last: int

    @classmethod
    def parse(cls, steps: str | None, last: int | None) -> Steps | None:
        """Of the command line, "A:B" or "A", or the number of last steps. None: all. Raises ConfigError."""
        if last is not None:
            if steps is not None:
                raise ConfigError("--steps and --last exclude each other")
            if last < 1:
                raise ConfigError(f"--last {last}: expected 1 or more steps")
            return cls(None, last)
        if steps is None:
            return None
        first, _, end = steps.partition(":")
        if not (first.isdecimal() and (end or first).isdecimal() and 1 <= int(first) <= int(end or first)):
            raise ConfigError(
                f"--steps {steps}: expected FIRST:LAST, both included, from 1 on, such as 10:13"
            )
        return cls(int(first), int(end or first))


@dataclass(frozen=True, slots=True)
class Written:
    """What is in a trace. counts: spans by kind. seconds: between the first and the last moment. notes: gaps of the
    record, a line each."""

    file: Path
    size: int
    processes: int
    counts: Mapping[str, int]
    seconds: float
    arrows: Arrows
    notes: Sequence[str]

    def lines(self) -> list[str]:
        """For people."""
        n, arrows = sum(self.counts.values()), self.arrows
        size = f"{self.size / 1e6:.1f} MB" if self.size >= 1e6 else f"{self.size / 1e3:.1f} kB"
        lines = [
            f"{self.file}: {size}, {n:,} spans of {self.processes} processes in "
            f"{self.seconds:,.1f} s of the run",
            "spans: " + ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items()),
        ]
        if arrows.counts:
            lines.append("arrows: " + ", ".join(f"{count:,} {name}" for name, count in arrows.counts.items()))
        if arrows.backwards:
            lines.append(
                f"{arrows.backwards:,} arrows would go back in time, by up to {arrows.most_ns / 1e6:,.1f} ms, and are "
                "left out: the servers' clocks differ"
            )
        lines += self.notes[:5]
        if len(self.notes) > 5:
            lines.append(f"... and {len(self.notes) - 5} more gaps of the record")
        return [
            *lines,
            'To open it: https://ui.perfetto.dev, "Open trace file"; the file stays in the browser.',
        ]


def export(
    folders: Sequence[Path], out: Path | None, steps: Steps | None, progress: Callable[[int, int], None]
) -> Written:
    """Write the trace of one run. folders: of its parts, one a server, that of the launcher first. out: the file; None:
    in the first folder. progress: is called with (spans written, all). Raises ConfigError."""
    protocol()
    policies = _policies(folders)
    out = folders[0] / FILE if out is None else out
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder does not exist'}")
    if out.exists() and not out.is_file():  # a device, whose name the trace would take away
        raise ConfigError(f"--out {out}: is there already and is no file")
    reader = SpanReader(folders)
    processes = {name: list(map(forward, spans)) for name, spans in reader.spans().items() if spans}
    notes = reader.notes()
    if not processes:
        why = "; ".join(notes) or "record.enabled or record.spans is off, or nothing has ended yet"
        raise ConfigError(f"{folders[0]}: no spans are recorded there ({why})")
    if steps is not None:
        processes = _within(processes, steps)
        notes += absent(reader.processes(), processes)
    arrows = find_arrows(processes, Recording(folders), policies)
    total, done = sum(map(len, processes.values())), 0

    def written(spans: int) -> None:
        nonlocal done
        done += spans
        progress(done, total)

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write_trace(file, processes, arrows, written)
        size = partial.stat().st_size
        partial.replace(out)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
        raise
    counts = Counter(span.kind for spans in processes.values() for span in spans)
    start, end = _bounds([span for spans in processes.values() for span in spans])
    ordered = dict(counts.most_common())
    return Written(out, size, len(processes), ordered, (end - start) / 1e9, arrows, notes)


def _policies(folders: Sequence[Path]) -> dict[str, str]:
    """Role -> role of the policy it acts with, by the first folder's config; checks the folders."""
    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise ConfigError(f"{missing}: there is no such folder")
    if not (folders[0] / _CONFIG).exists():
        raise ConfigError(f"{folders[0]}: not a run's folder (no {_CONFIG})")
    config = load_config(folders[0] / _CONFIG)
    return {role: config.policy_of(role) for role in config.roles}


def _within(processes: Mapping[str, list[Span]], steps: Steps) -> dict[str, list[Span]]:
    """The spans that touch the time in which the steps were taken by any trainer."""
    taken = {  # the last time, where a resumed run took a step again
        (process, int(span.args["step"]) + 1): span
        for process, spans in processes.items()
        for span in spans
        if span.kind == "step" and "step" in span.args
    }
    if not taken:
        raise ConfigError("no step of a trainer is in the record yet: leave --steps and --last out")
    last = max(step for _, step in taken)
    first, end = (last - steps.last + 1, last) if steps.first is None else (steps.first, steps.last)
    chosen = [span for (_, step), span in taken.items() if first <= step <= end]
    if not chosen:
        have = f"{min(step for _, step in taken)} to {last}"
        raise ConfigError(f"--steps {first}:{end}: none of them is in the record, which has steps {have}")
    since, until = _bounds(chosen)
    kept = {
        process: [span for span in spans if span.end >= since and span.start <= until]
        for process, spans in processes.items()
    }
    return {process: spans for process, spans in kept.items() if spans}


def _bounds(spans: Sequence[Span]) -> tuple[int, int]:
    return min(span.start for span in spans), max(span.end for span in spans)
