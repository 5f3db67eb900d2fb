"""What changed between two versions of the same layout, exactly, slice by slice.

Values travel as old XOR new of their bits. A small step in bfloat16 leaves most weights as they are and moves the rest
by a bit or two, so a patch is a few per cent of the version; applied twice, it is undone.

    patch   = [ u32 number of changes | 16 bytes each: u32 slice, u32 encoding, u32 bytes, u32 crc32c | payloads ]
    SPARSE  zstd of [ u32 bytes of gaps | gaps | values by byte plane ]   (csrc/weight_patch.hpp)
    DENSE   for each byte plane: u32 bytes, then zstd of it, or the plane itself where that is no shorter

Where more than a third of a slice changed, all of it travels (DENSE). The crc32c is that of the slice's *new* bytes: a
receiver knows from it that what it holds now is what the trainer holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zstandard

from mgrpo import _C
from mgrpo.errors import CorruptionError
from mgrpo.weights.layout import Layout, Slice

Bytes = npt.NDArray[np.uint8]
SPARSE, DENSE = 0, 1
LEVEL = 1  # of zstd: higher ones gain little on bits that are nearly random
SAMPLE = 1 << 16  # bytes of a plane that are tried before all of it is compressed
_U32 = struct.Struct("<I")
_HEAD = struct.Struct("<IIII")


def checksum(data: Bytes) -> int:
    """crc32c."""
    return int(google_crc32c.value(data))


def bytes_of(data: Any) -> Bytes:
    """A view of a buffer as an array of bytes."""
    return data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)


@dataclass(frozen=True, slots=True)
class Change:
    """One slice's difference."""

    slice: Slice
    itemsize: int
    encoding: int
    payload: Bytes
    crc: int

    def apply(self, data: Any) -> None:
        """XOR it into the slice's bytes (a writable buffer of piece.nbytes). Raises CorruptionError, nothing having
        been changed, where the payload is damaged. That the result is the new version says check()."""
        try:
            if self.encoding == SPARSE:
                _C.apply_sparse(data, self.itemsize, *self._sparse())
            else:
                _C.apply_dense(data, self.itemsize, self._planes())
        except ValueError as error:
            raise self._damaged(error) from None

    def entries(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
        """(indices i64 (n,) of the elements within the slice, their XOR (n,) as unsigned integers): for memory that
        apply() cannot reach."""
        count = self.slice.nbytes // self.itemsize
        try:
            if self.encoding == SPARSE:
                gaps, planes = self._sparse()
                indices = _C.sparse_indices(gaps, count)
            else:
                planes, indices = self._planes(), np.arange(count)
        except ValueError as error:
            raise self._damaged(error) from None
        if len(planes) != len(indices) * self.itemsize:
            raise self._damaged(ValueError(f"{len(indices)} elements, {len(planes)} bytes of values"))
        values = planes.reshape(self.itemsize, len(indices)).T
        return indices, np.ascontiguousarray(values).view(f"<u{self.itemsize}")[:, 0]

    def check(self, data: Any) -> bool:
        """Are these the slice's new bytes?"""
        return checksum(bytes_of(data)) == self.crc

    def _sparse(self) -> tuple[Bytes, Bytes]:
        raw = self._unpacked(self.payload, 8 * self.slice.nbytes + 64)
        size = _U32.unpack_from(raw.data)[0] if len(raw) >= 4 else len(raw)
        if 4 + size > len(raw):
            raise ValueError(f"gaps of {size} bytes in {len(raw)}")
        return raw[4 : 4 + size], raw[4 + size :]

    def _planes(self) -> Bytes:
        count, at, parts = self.slice.nbytes // self.itemsize, 0, []
        for _ in range(self.itemsize):
            if at + 4 > len(self.payload):
                raise ValueError(f"{len(self.payload)} bytes end before the last plane")
            size = _U32.unpack_from(self.payload.data, at)[0]
            packed = self.payload[at + 4 : at + 4 + size]
            at += 4 + size
            parts.append(packed if size == count else self._unpacked(packed, count))
        planes = np.concatenate(parts)
        if len(planes) != self.slice.nbytes:
            raise ValueError(f"{len(planes)} bytes for a slice of {self.slice.nbytes}")
        return planes

    def _unpacked(self, data: Bytes, limit: int) -> Bytes:
        try:
            if zstandard.frame_content_size(data.data) > limit:
                raise ValueError(f"more than {limit} bytes")
            return bytes_of(zstandard.ZstdDecompressor().decompress(data.data))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None

    def _damaged(self, error: Exception) -> CorruptionError:
        return CorruptionError(f"the patch of slice {self.slice.index} is damaged: {error}")


def difference(piece: Slice, itemsize: int, before: Bytes, after: Bytes) -> Change | None:
    """What changed between two states of a slice; None when nothing did."""
    count = piece.nbytes // itemsize
    sparse = _C.xor_sparse(before, after, itemsize, count // 3)
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    if sparse is not None:
        gaps, values = sparse
        if not len(gaps):
            return None
        raw = np.concatenate([bytes_of(_U32.pack(len(gaps))), gaps, values])
        return Change(piece, itemsize, SPARSE, bytes_of(compressor.compress(raw.data)), checksum(after))
    planes = _C.xor_dense(before, after, itemsize)
    parts: list[Any] = []
    for plane in planes.reshape(itemsize, count):
        packed: Any = plane
        if len(compressor.compress(plane[:SAMPLE].data)) < 0.9 * min(count, SAMPLE):
            packed = compressor.compress(plane.data)
            packed = packed if len(packed) < count else plane
        parts += [bytes_of(_U32.pack(len(packed))), bytes_of(packed)]
    return Change(piece, itemsize, DENSE, np.concatenate(parts), checksum(after))


@dataclass(slots=True)
class Patch:
    """From version `base` to version `label`: the slices that changed, by index. data: the same as bytes with their
    crc32c, once it is complete."""

    base: str
    label: str
    changes: dict[int, Change]
    data: Bytes | None = None
    crc: int = 0

    @property
    def nbytes(self) -> int:
        if self.data is not None:
            return len(self.data)
        return 4 + sum(_HEAD.size + len(change.payload) for change in self.changes.values())

    def pack(self) -> None:
        """Nothing will be added: bring it into one piece of memory, which the changes share from then on. Each moves by
        itself, so that no second patch is in memory, and readers of `changes` always find it."""
        self.changes = dict(sorted(self.changes.items()))  # threads have added them
        heads = b"".join(
            _HEAD.pack(c.slice.index, c.encoding, len(c.payload), c.crc) for c in self.changes.values()
        )
        data, at = np.empty(self.nbytes, np.uint8), 4 + len(heads)
        data[:at] = bytes_of(_U32.pack(len(self.changes)) + heads)
        for index in list(self.changes):
            change = self.changes[index]
            end = at + len(change.payload)
            data[at:end] = change.payload
            self.changes[index] = replace(change, payload=data[at:end])
            at = end
        self.crc, self.data = checksum(data), data


def parse_changes(read: Callable[[int, int], Bytes], size: int, layout: Layout) -> Iterator[Change]:
    """The changes of a patch of `size` bytes, in order, each payload read when it is asked for. read(at, n): n of its
    bytes. Raises CorruptionError where they are no patch of this layout."""
    count = _U32.unpack_from(read(0, 4).data)[0] if size >= 4 else 0
    at = 4 + count * _HEAD.size
    if size < 4 or at > size:
        raise CorruptionError(f"a patch of {size} bytes is cut off")
    heads = read(4, count * _HEAD.size)
    for index, encoding, length, crc in _HEAD.iter_unpack(heads.data):
        if index >= len(layout.slices) or encoding not in (SPARSE, DENSE) or at + length > size:
            raise CorruptionError(
                f"a patch of {size} bytes names slice {index} of {len(layout.slices)}, encoding {encoding}, "
                f"{length} bytes at {at}"
            )
        piece = layout.slices[index]
        yield Change(piece, layout.tensors[piece.tensor].itemsize, encoding, read(at, length), crc)
        at += length
    if at != size:
        raise CorruptionError(f"a patch of {size} bytes ends at {at}")
