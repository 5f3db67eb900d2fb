"""One version on its way into an engine: its label, its layout, and the parts that it arrived in.

A part is a whole version (a safetensors file with the checksums of its slices) or a patch against the version before.
Parts lie in spools, in main memory below SPOOL bytes and in a temporary file above: a receiver never holds a whole
model beside its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from mgrpo.errors import CorruptionError
from mgrpo.types import Probe
from mgrpo.weights.layout import Layout, Slice
from mgrpo.weights.patch import Bytes, Change, bytes_of, checksum, parse_changes

SPOOL = 64 << 20  # bytes of a part that are kept in main memory
_BLOCK = 4 << 20


class Spool:
    """Bytes that are written in any order and then read. Freed with the object."""

    def __init__(self, size: int, folder: Path | None = None) -> None:
        """folder: for the temporary file; None: the system's."""
        self.size = size
        self._file: BinaryIO | None = None
        self._memory = bytearray(size) if size <= SPOOL else None
        if self._memory is None:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix="mgrpo-weights-")  # noqa: SIM115 - lives on
            os.truncate(self._file.fileno(), size)

    def write(self, at: int, data: bytes | bytearray | memoryview) -> None:
        if self._memory is not None:
            self._memory[at : at + len(data)] = data
        else:
            assert self._file is not None
            while len(data):
                written = os.pwrite(self._file.fileno(), data, at)
                at, data = at + written, memoryview(data)[written:]

    def read(self, at: int, size: int) -> Bytes:
        """(n,) bytes, fewer than size at the end."""
        if self._memory is not None:
            return bytes_of(memoryview(self._memory)[at : at + size])
        assert self._file is not None
        parts = []
        while size and (part := os.pread(self._file.fileno(), size, at)):
            parts.append(part)
            at, size = at + len(part), size - len(part)
        return bytes_of(parts[0] if len(parts) == 1 else b"".join(parts))

    def layout(self) -> Layout:
        """Of the safetensors file that the bytes are. Raises ValueError where they are none."""
        return Layout.read(lambda at, size: self.read(at, size).tobytes(), self.size)

    def copy_to(self, path: Path, at: int = 0) -> None:
        """Write everything from byte `at` on into a new file."""
        with path.open("wb") as out:
            for start in range(at, self.size, _BLOCK):
                out.write(self.read(start, _BLOCK).data)

    def checksum(self) -> int:
        crc = 0
        for start in range(0, self.size, _BLOCK):
            crc = google_crc32c.extend(crc, self.read(start, _BLOCK))
        return crc

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._memory = None
        if self._file is not None:
            self._file.close()


@dataclass(slots=True)
class Part:
    """What leads from version `base` ("" for nothing at all) to version `label`. sums: of a whole, u32 of each
    slice."""

    base: str
    label: str
    spool: Spool
    sums: np.ndarray[tuple[int], np.dtype[np.uint32]] | None = None


@dataclass(slots=True)
class Weights:
    """A version for an engine. parts: one whole, or patches in order; none of what servers got another way."""

    label: str
    version: int
    layout: Layout
    parts: tuple[Part, ...] = ()
    probe: Probe | None = None

    @classmethod
    def of_bytes(cls, label: str, version: int, data: bytes, probe: Probe | None = None) -> Weights:
        """From a safetensors file's bytes. Raises ValueError where they are none."""
        layout = Layout.parse(data)
        if len(data) != len(layout.header) + layout.size:
            raise ValueError(
                f"{len(data)} bytes of weights are not in safetensors format: the header announces "
                f"{len(layout.header) + layout.size}"
            )
        spool = Spool(len(data))
        spool.write(0, data)
        return cls(label, version, layout, (Part("", label, spool),), probe)

    @classmethod
    def of_file(cls, label: str, version: int, path: Path) -> Weights:
        """From a safetensors file. Raises ValueError where it is none, OSError."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            spool = Spool(size, path.parent)
            at = 0
            while block := file.read(_BLOCK):
                spool.write(at, block)
                at += len(block)
        layout = spool.layout()
        if size != len(layout.header) + layout.size:
            raise ValueError(
                f"{path}: {size} bytes are not in safetensors format: the header announces "
                f"{len(layout.header) + layout.size}"
            )
        return cls(label, version, layout, (Part("", label, spool),))

    @property
    def is_direct(self) -> bool:
        """The trainer brings the weights to the servers itself: there is nothing to load, only to wait for."""
        return not self.parts

    @property
    def is_whole(self) -> bool:
        return bool(self.parts) and not self.parts[0].base

    @property
    def base(self) -> str:
        """Label of the version that it changes; "" for a whole one."""
        return self.parts[0].base if self.parts else ""

    @property
    def data(self) -> bytes:
        """A whole as one object, a safetensors file: for engines that have no use for less."""
        assert self.is_whole, f"{self.label} is a patch of {self.base}"
        return self.parts[0].spool.read(0, self.parts[0].spool.size).tobytes()

    @property
    def nbytes(self) -> int:
        """Bytes that arrived."""
        return sum(part.spool.size for part in self.parts)

    def verify(self) -> None:
        """Raises CorruptionError naming the first slice of a whole that is not what the trainer sent."""
        sums = self.parts[0].sums if self.is_whole else None
        if sums is not None:
            for piece, data in self.slices():
                if checksum(data) != sums[piece.index]:
                    name = self.layout.tensors[piece.tensor].name
                    raise CorruptionError(
                        f"{self.label}: {name} arrived damaged (bytes {piece.start}..{piece.stop})"
                    )

    def slices(self) -> Iterator[tuple[Slice, Bytes]]:
        """A whole's slices with their bytes, in order, each read when it is asked for."""
        assert self.is_whole, f"{self.label} is a patch of {self.base}"
        header = len(self.layout.header)
        for piece in self.layout.slices:
            yield piece, self.parts[0].spool.read(header + piece.offset, piece.nbytes)

    def patches(self) -> Iterator[tuple[str, Iterator[Change]]]:
        """(label that it leads to, its changes) of each patch, in order. Raises CorruptionError."""
        assert not self.is_whole
        for part in self.parts:
            yield part.label, parse_changes(part.spool.read, part.spool.size, self.layout)

    def write_safetensors(self, path: Path) -> None:
        """A whole, as a file."""
        assert self.is_whole
        self.parts[0].spool.copy_to(path)

    def close(self) -> None:
        """Free the spools."""
        for part in self.parts:
            part.spool.close()
