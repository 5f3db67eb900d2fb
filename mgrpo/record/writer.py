"""The writing side of a record. A disk that is full, read-only or gone ends the recording and nothing else.

The first error of the disk stops the recording of this process for good, is reported once and is noted in the record's
folder; the process that is started next tries again. Nothing in training reads the record, so a gap in it costs a look.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mgrpo.files import remove_partials, write_atomic
from mgrpo.record.notes import Notes
from mgrpo.record.segments import SegmentWriter

Report = Callable[[str], None]  # takes one line for people


class RecordWriter:
    """The files of one process's record in one folder. No method raises OSError."""

    def __init__(self, folder: Path, max_bytes: int, report: Report) -> None:
        self.folder, self._report = folder, report
        self._segments: SegmentWriter | None = None
        self._notes: Notes | None = None
        with self.guard("the start"):
            segments = SegmentWriter(folder, max_bytes)
            remove_partials(folder)
            self._notes = Notes(folder)
            self._segments = segments

    @property
    def active(self) -> bool:
        """False once recording has stopped."""
        return self._segments is not None

    def append(self, step: int, head: bytes, body: bytes) -> None:
        """Add one frame that is about `step`."""
        if self._segments is not None:
            with self.guard(f"step {step}"):
                self._segments.append(head, body)

    def file(self, name: str, data: bytes) -> None:
        """Write a whole file beside the frames."""
        if self._segments is not None:
            with self.guard(name):
                write_atomic(self.folder / name, data)

    @contextlib.contextmanager
    def guard(self, place: str) -> Iterator[None]:
        """An OSError of the block stops the recording instead of reaching the caller. place: where it stops, in words,
        such as "step 12"."""
        try:
            yield
        except OSError as error:
            self.close()
            self.note(f"recording stopped at {place}: {error.strerror or error}")

    def note(self, text: str) -> None:
        """Report a line and keep it in the record, as far as the disk allows."""
        with contextlib.suppress(OSError):
            if self._notes is not None:
                self._notes.add(text)
        self._report(f"{self.folder}: {text}")

    def close(self) -> None:
        """Idempotent."""
        segments, self._segments = self._segments, None
        if segments is not None:
            with contextlib.suppress(OSError):
                segments.close()
