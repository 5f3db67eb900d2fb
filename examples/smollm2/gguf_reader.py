"""Reads GGUF files (versions 2 and 3): the metadata, and the tensors dequantised to float32.

The layout of a file, little-endian:

    "GGUF", version u32, number of tensors u64, number of metadata entries u64
    metadata entries: key, type u32, value
    tensor entries:   name, number of dimensions u32, dimensions u64 (innermost first), type u32, offset u64
    padding to general.alignment (32), then the tensors' data, each at its offset

A quantised tensor is a sequence of blocks; BLOCKS holds what is known of each type. A value is computed in float32 in
the order of the formula that stands with its function, so that other readers' float32 results are met bit for bit.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufError(ValueError):
    """The file is not what a GGUF file should be, or holds what this reader does not know."""


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _q4_1(blocks: Bytes) -> Floats:
    """x = d * q + m: d f16, m f16, 16 bytes whose low halves are the first 16 values, the high halves the others."""
    d, m = (blocks[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    packed = blocks[:, 4:]
    q = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
    return d * q + m


def _q8_0(blocks: Bytes) -> Floats:
    """x = d * q: d f16, 32 signed bytes."""
    d = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return d * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q6_k(blocks: Bytes) -> Floats:
    """x = (d * scale) * (q - 32): 128 bytes of low halves, 64 bytes of two high bits, 16 scales of 16 values, d f16.

    Each half of 128 values uses 64 bytes of low halves and 32 bytes of high bits: value 32 j + i takes the low (j < 2)
    or high half of byte 32 (j % 2) + i, and bits 2j, 2j + 1 of high byte i.
    """
    n = len(blocks)
    low, high = blocks[:, :128].reshape(n, 2, 1, 64), blocks[:, 128:192].reshape(n, 2, 1, 32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    d = blocks[:, 208:210].copy().view("<f2").astype(np.float32)
    shift4 = np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    shift2 = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    q = ((low >> shift4) & 0x0F).reshape(n, 2, 4, 32) | (((high >> shift2) & 0x03) << 4)
    signed = q.reshape(n, 16, 16).astype(np.float32) - np.float32(32)
    return ((d * scales)[:, :, None] * signed).reshape(n, 256)


@dataclass(frozen=True, slots=True)
class Block:
    """One tensor type: values and bytes of a block, and (n, bytes) u8 -> (n, values) f32."""

    name: str
    values: int
    size: int
    decode: Callable[[Bytes], Floats]


BLOCKS = {
    0: Block("F32", 1, 4, _f32),
    1: Block("F16", 1, 2, _f16),
    3: Block("Q4_1", 32, 20, _q4_1),
    8: Block("Q8_0", 32, 34, _q8_0),
    14: Block("Q6_K", 256, 210, _q6_k),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]  # outermost first, as numpy and torch write it
    block: Block
    offset: int


class _Cursor:
    """Reads values one after the other; a file that ends too early is a GgufError."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self.at = data, path, 0

    def bytes(self, n: int) -> bytes:
        if self.at + n > len(self._data):
            raise GgufError(
                f"{self._path}: ends at byte {len(self._data)}, expected {n} more after {self.at}"
            )
        self.at += n
        return self._data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, n = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                code = _SCALARS[inner]
                return list(struct.unpack(f"<{n}{code}", self.bytes(n * struct.calcsize("<" + code))))
            return [self.value(inner) for _ in range(n)]
        if kind not in _SCALARS:
            raise GgufError(f"{self._path}: unknown metadata type {kind} before byte {self.at}")
        return self.number(_SCALARS[kind])


class GgufFile:
    """An open GGUF file; a context manager. Raises GgufError naming the file and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        """metadata holds every entry by its key; names() and tensor() give the tensors."""
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise GgufError(f"{path}: {path.stat().st_size} bytes, too short for a GGUF file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._data, path)
        if (magic := cursor.bytes(4)) != MAGIC:
            raise GgufError(f"{path}: begins with {magic!r}, expected {MAGIC!r}")
        if (version := cursor.number("I")) not in VERSIONS:
            raise GgufError(f"{path}: version {version}, expected one of {VERSIONS}")
        tensors, entries = cursor.number("Q"), cursor.number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("I"))
        self._entries = dict(self._entry(cursor) for _ in range(tensors))
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-cursor.at // alignment) * alignment

    def _entry(self, cursor: _Cursor) -> tuple[str, _Entry]:
        name = cursor.string()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in BLOCKS:
            known = ", ".join(f"{i} ({b.name})" for i, b in BLOCKS.items())
            raise GgufError(f"{self.path}: tensor {name} has type {kind}, expected one of {known}")
        if shape[-1] % BLOCKS[kind].values:
            raise GgufError(
                f"{self.path}: rows of tensor {name} have {shape[-1]} values, expected a multiple of "
                f"{BLOCKS[kind].values} ({BLOCKS[kind].name})"
            )
        return name, _Entry(shape, BLOCKS[kind], offset)

    def names(self) -> Iterator[str]:
        return iter(self._entries)

    def type_name(self, name: str) -> str:
        """How tensor `name` is stored, e.g. "Q4_1"."""
        return self._entries[name].block.name

    def tensor(self, name: str) -> Floats:
        """Tensor `name` in float32, outermost dimension first."""
        if name not in self._entries:
            raise GgufError(f"{self.path}: no tensor {name!r}")
        entry = self._entries[name]
        count = int(np.prod(entry.shape)) // entry.block.values
        begin, size = self._start + entry.offset, count * entry.block.size
        if begin + size > len(self._data):
            raise GgufError(
                f"{self.path}: tensor {name} ends after the file, which has {len(self._data)} bytes"
            )
        # A copy: no view into the map may outlive close().
        blocks = np.frombuffer(self._data[begin : begin + size], np.uint8).reshape(count, entry.block.size)
        return np.ascontiguousarray(entry.block.decode(blocks)).reshape(entry.shape)

    def close(self) -> None:
        self._data.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
