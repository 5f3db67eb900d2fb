"""The spans of a run, process by process; see spans.py."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from mgrpo.errors import CorruptionError
from mgrpo.record.notes import read_notes
from mgrpo.record.segments import Frame, SegmentReader
from mgrpo.record.spans import FOLDER, Span, SpansHead

PATTERNS = (f"rollouts/*/{FOLDER}", f"agents/*/record/{FOLDER}")


def gaps(folders: Sequence[Path]) -> list[str]:
    """A line for each gap in the spans below these folders: where recording stopped and why, and what was deleted to
    stay within record.max_mb."""
    lines: list[str] = []
    for path in _parts(folders):
        lines += [f"{path}: {note}" for note in read_notes(path)]
        numbers = {int(p.stem) for p in path.glob("*.rec") if p.stem.isdecimal()}
        gone = max(numbers, default=0) - len(numbers)
        if gone > 0:
            files = "file after the first is" if gone == 1 else "files after the first are"
            lines.append(f"{path}: {gone} {files} gone, deleted to stay within record.max_mb")
    return lines


def absent(recorded: Collection[str], shown: Collection[str]) -> list[str]:
    """At most one line: which processes of a run have nothing in what is shown of it."""
    names = ", ".join(sorted(set(recorded) - set(shown)))
    return [f"nothing of these steps: {names} (idle or ended, or another server's clock)"] if names else []


def _parts(folders: Sequence[Path]) -> list[Path]:
    return [p for folder in folders for pattern in PATTERNS for p in sorted(folder.glob(pattern))]


class SpanReader:
    """The spans below one or several folders (a run that was spread over servers leaves some on each). Call refresh()
    to see what a live run has added. What cannot be read is passed over (`damaged`)."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._readers: dict[Path, SegmentReader] = {}
        self._frames: list[tuple[SpansHead, Frame]] = []
        self._head = msgspec.msgpack.Decoder(SpansHead)
        self._body = msgspec.msgpack.Decoder(list[Span])
        self.damaged: dict[Path, str] = {}
        self.refresh()

    def refresh(self) -> int:
        """Take in what is new; returns the number of new frames."""
        before = len(self._frames)
        for path in _parts(self._folders):
            reader = self._readers.setdefault(path, SegmentReader(path))
            for frame in reader.fresh():
                try:
                    self._frames.append((self._head.decode(frame.head), frame))
                except msgspec.DecodeError as error:
                    self.damaged.setdefault(frame.path, f"spans cannot be read ({error})")
            self.damaged |= reader.damaged
        return len(self._frames) - before

    def notes(self) -> list[str]:
        """A line for each gap, and for each file in which something had to be passed over up to now."""
        return gaps(self._folders) + [f"{path}: {what}" for path, what in dict(self.damaged).items()]

    def processes(self) -> set[str]:
        """All that have recorded anything."""
        return {head.process for head, _ in self._frames}

    def bounds(self) -> tuple[int, int] | None:
        """Unix ns of the earliest start and the latest end; None where there are no spans."""
        if not self._frames:
            return None
        return min(head.first for head, _ in self._frames), max(head.last for head, _ in self._frames)

    def spans(self, start: int | None = None, end: int | None = None) -> dict[str, list[Span]]:
        """Process -> its spans that touch [start, end] (Unix ns; None: no bound), by start, the longer first."""
        found: dict[str, list[Span]] = {}
        for head, frame in self._frames:
            if (start is not None and head.last < start) or (end is not None and head.first > end):
                continue
            try:
                body = self._body.decode(frame.body())
            except (CorruptionError, msgspec.DecodeError) as error:
                self.damaged.setdefault(frame.path, f"spans cannot be read ({error})")
                continue
            found.setdefault(head.process, []).extend(
                s for s in body if (start is None or s.end >= start) and (end is None or s.start <= end)
            )
        for spans in found.values():
            spans.sort(key=lambda s: (s.start, -s.end))
        return dict(sorted(found.items()))
