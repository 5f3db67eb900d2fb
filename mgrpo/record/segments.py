"""Record files: framed MessagePack in segments of bounded total size, readable while they grow.

    segment = 16-byte head, then frames
    frame   = magic u32 | head length u32 | body length u32 | crc32c of head u32 | crc32c of body u32 | head | body

A head is small and says what the frame is about, so that a reader lists thousands of frames without decoding their
bodies. A frame leaves in one write. A process that dies leaves at most one torn frame, at the end of a segment: readers
stop there, and the next process begins a new segment. Nothing is synced to disk: losing the last frames with the
machine costs a look at them, not the run. Readers pass over what such a loss, or a bad disk, has damaged, and name it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from mgrpo.errors import CorruptionError

HEAD = b"mgrpo record 1\n\0"
_FRAME = struct.Struct("<IIIII")
_MAGIC = 0x4352474D
SEGMENTS = 16  # a folder's bound is spent in so many segments; one of them is the unit that is deleted


class SegmentWriter:
    """Appends frames to <folder>/<number>.rec and keeps the folder below max_bytes.

    When the bound is reached the oldest segment goes, but never the first: the start of a run is what its end is
    compared with."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._segment_bytes = folder, max(1, max_bytes // SEGMENTS)
        self._number = max((int(p.stem) for p in folder.glob("*.rec")), default=0)
        self._file = -1
        self._size = 0

    def append(self, head: bytes, body: bytes) -> None:
        frame = _FRAME.pack(
            _MAGIC, len(head), len(body), google_crc32c.value(head), google_crc32c.value(body)
        )
        if self._file < 0 or self._size + len(frame) + len(head) + len(body) > self._segment_bytes:
            self._next()
        data = b"".join((frame, head, body))
        while data:
            data = data[os.write(self._file, data) :]
        self._size += len(frame) + len(head) + len(body)

    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _next(self) -> None:
        self.close()
        while self._file < 0:
            self._number += 1
            path = self._folder / f"{self._number:06d}.rec"
            with contextlib.suppress(FileExistsError):  # another process records into this folder too
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(self._file, HEAD)
        self._size = len(HEAD)
        segments = sorted(self._folder.glob("*.rec"))
        total = sum(p.stat().st_size for p in segments[:-1]) + self._segment_bytes  # the new one will be full
        for old in segments[1:-1]:
            if total <= self._segment_bytes * SEGMENTS:
                break
            total -= old.stat().st_size
            old.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame's body lies."""

    path: Path
    head: bytes
    offset: int
    length: int
    crc: int

    def body(self) -> bytes:
        """Raises CorruptionError naming the file, and why: damaged, or deleted to keep the record within its bound."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except FileNotFoundError:
            raise CorruptionError(f"{self.path} is gone: the record had reached record.max_mb") from None
        except OSError as error:
            raise CorruptionError(f"{self.path}: {error.strerror}") from None
        if google_crc32c.value(data) != self.crc:
            raise CorruptionError(
                f"{self.path} at byte {self.offset}: a record's body does not match its checksum"
            )
        return data


class SegmentReader:
    """Lists the frames of a folder; each call of `fresh` yields what has come since the last one.

    damaged: file -> what is wrong with it, for each in which something had to be passed over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}  # bytes of each segment that have been listed
        self.damaged: dict[Path, str] = {}

    def fresh(self) -> Iterator[Frame]:
        for path in sorted(self._folder.glob("*.rec")):
            at = self._read.get(path, 0)
            try:
                size = path.stat().st_size
                if size <= max(at, len(HEAD)):
                    continue
                data = path.read_bytes() if at == 0 else _tail(path, at)
            except FileNotFoundError:  # rotated away between the listing and the look
                continue
            base = at
            if at == 0:
                if data[: len(HEAD)] != HEAD:
                    self.damaged[path] = "not a record file of this version"
                    self._read[path] = size
                    continue
                at = len(HEAD)
            for frame in self._frames(path, data, base, at):
                at = frame.offset + frame.length
                yield frame
            self._read[path] = at

    def _frames(self, path: Path, data: bytes, base: int, at: int) -> Iterator[Frame]:
        """Whole frames of `data` (which starts at byte `base` of the file) from byte `at` on."""
        while at - base + _FRAME.size <= len(data):
            frame = _frame(path, data, base, at)
            if frame is None:
                found = _next_frame(path, data, base, at)
                if found is None:
                    return  # torn, or still being written
                self.damaged.setdefault(path, f"damaged from byte {at} to byte {found}")
                at = found
                continue
            yield frame
            at = frame.offset + frame.length


def _tail(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read()


def _frame(path: Path, data: bytes, base: int, at: int) -> Frame | None:
    """The frame at byte `at` of the file, None where there is no whole one."""
    if at - base + _FRAME.size > len(data):
        return None
    magic, head_length, body_length, head_crc, body_crc = _FRAME.unpack_from(data, at - base)
    start = at + _FRAME.size
    end = start + head_length + body_length
    if magic != _MAGIC or end - base > len(data):
        return None
    head = data[start - base : start - base + head_length]
    if google_crc32c.value(head) != head_crc:
        return None
    return Frame(path, head, start + head_length, body_length, body_crc)


def _next_frame(path: Path, data: bytes, base: int, at: int) -> int | None:
    """The first byte beyond `at` at which a whole frame begins."""
    mark = struct.pack("<I", _MAGIC)
    found = data.find(mark, at - base + 1)
    while found >= 0:
        if _frame(path, data, base, base + found) is not None:
            return base + found
        found = data.find(mark, found + 1)
    return None
