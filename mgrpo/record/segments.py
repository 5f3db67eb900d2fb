"""Record files: framed MessagePack in segments of bounded total size, readable while they grow.

    segment = 16-byte head, then frames
    frame   = magic u32 | head length u32 | body length u32 | crc32c of head u32 | crc32c of body u32 | head | body

A head is small and says what the frame is about, so that a reader lists thousands of frames without decoding their
bodies. A frame leaves in one write. A process that dies leaves at most one torn frame, at the end of a segment: readers
stop there, and the next process begins a new segment. Nothing is synced to disk: losing the last frames with the
machine costs a look at them, not the run.
"""

from __future__ import annotations

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
        self._number += 1
        path = self._folder / f"{self._number:06d}.rec"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.write(self._file, HEAD)
        self._size = len(HEAD)
        segments = sorted(self._folder.glob("*.rec"))
        total = sum(p.stat().st_size for p in segments[:-1]) + self._segment_bytes  # the new one will be full
        for old in segments[1:-1]:
            if total <= self._segment_bytes * SEGMENTS:
                break
            total -= old.stat().st_size
            old.unlink()


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame's body lies."""

    path: Path
    head: bytes
    offset: int
    length: int
    crc: int

    def body(self) -> bytes:
        """Raises CorruptionError naming the file; FileNotFoundError when the segment has been rotated away."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if google_crc32c.value(data) != self.crc:
            raise CorruptionError(
                f"{self.path} at byte {self.offset}: a record's body does not match its checksum"
            )
        return data


class SegmentReader:
    """Lists the frames of a folder; each call of `fresh` yields what has come since the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}  # bytes of each segment that have been listed

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
                    raise CorruptionError(f"{path} is not a record file of this version")
                at = len(HEAD)
            for frame in _frames(path, data, base, at):
                at = frame.offset + frame.length
                yield frame
            self._read[path] = at


def _tail(path: Path, at: int) -> bytes:
    with path.open("rb") as file:
        file.seek(at)
        return file.read()


def _frames(path: Path, data: bytes, base: int, at: int) -> Iterator[Frame]:
    """Whole frames of `data` (which starts at byte `base` of the file) from byte `at` on."""
    while at - base + _FRAME.size <= len(data):
        magic, head_length, body_length, head_crc, body_crc = _FRAME.unpack_from(data, at - base)
        start = at + _FRAME.size
        end = start + head_length + body_length
        head = data[start - base : start - base + head_length]
        if magic != _MAGIC or end - base > len(data) or google_crc32c.value(head) != head_crc:
            return  # torn, or still being written
        yield Frame(path, head, start + head_length, body_length, body_crc)
        at = end
