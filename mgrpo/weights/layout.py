"""What a version consists of: the header of a safetensors file, cut into slices.

    safetensors file = [8 bytes: length of the JSON | JSON: name -> dtype, shape, place | data of all tensors]

A whole version, as bytes, is such a file, so any program reads it. A *slice* is a piece of one tensor, at most SLICE
bytes of it: what is compared, checksummed and applied at a time. Both sides cut alike, since both have the header.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

SLICE = 16 << 20  # bytes

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
SIZES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
"""Bytes of an element, by safetensors' name of its dtype."""
_LENGTH = 8  # bytes of the JSON's length


class TensorInfo(NamedTuple):
    """One tensor; `offset` is its first byte in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def itemsize(self) -> int:
        return SIZES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes start..stop of tensor number `tensor`, which begin at `offset` of the data section."""

    index: int
    tensor: int
    start: int
    stop: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Names, dtypes, shapes and order of a version's tensors. `header`: the file's bytes before the data."""

    header: bytes
    tensors: tuple[TensorInfo, ...]

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, str, Sequence[int]]]) -> Layout:
        """From (name, dtype, shape) of each tensor, in the order of the data. Raises ValueError."""
        infos, at = [], 0
        for name, dtype, shape in tensors:
            if dtype not in SIZES:
                raise ValueError(f"{name}: dtype {dtype} is none of {', '.join(SIZES)}")
            info = TensorInfo(name, dtype, tuple(shape), at)
            at += info.nbytes
            infos.append(info)
        if len({info.name for info in infos}) != len(infos):
            raise ValueError("two tensors have the same name")
        entries = {
            info.name: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [info.offset, info.offset + info.nbytes],
            }
            for info in infos
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return cls(len(text).to_bytes(_LENGTH, "little") + text, tuple(infos))

    @classmethod
    def read(cls, read: Callable[[int, int], bytes], size: int) -> Layout:
        """From a safetensors file of `size` bytes. read(at, n): n of them. Raises ValueError for what is none."""
        length = int.from_bytes(read(0, _LENGTH), "little")
        return cls.parse(read(0, min(_LENGTH + length, size)))

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Layout:
        """From the beginning of a safetensors file. Raises ValueError for what is none."""
        length = int.from_bytes(data[:_LENGTH], "little")
        if len(data) < _LENGTH or length > len(data) - _LENGTH:
            raise ValueError(
                f"{len(data)} bytes of weights are not in safetensors format: the header is cut off"
            )
        header = bytes(data[: _LENGTH + length])
        try:
            entries = json.loads(header[_LENGTH:])
            infos = [
                TensorInfo(str(name), str(entry["dtype"]), tuple(map(int, entry["shape"])), int(at))
                for name, entry in entries.items()
                if name != "__metadata__"
                for at, _ in [entry["data_offsets"]]
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{len(data)} bytes of weights are not in safetensors format: {error!r}"
            ) from None
        infos.sort(key=lambda info: (info.offset, info.nbytes if info.dtype in SIZES else 0))
        at = 0
        for info in infos:
            if info.dtype not in SIZES or min(info.shape, default=1) < 0 or info.offset != at:
                raise ValueError(
                    f"weights are not in safetensors format: {info.name} is {info.dtype} {info.shape} at byte "
                    f"{info.offset}, expected at {at}"
                )
            at += info.nbytes
        return cls(header, tuple(infos))

    @cached_property
    def size(self) -> int:
        """Bytes of the data section."""
        return sum(info.nbytes for info in self.tensors)

    @cached_property
    def digest(self) -> str:
        """Equal for equal layouts."""
        return hashlib.sha256(self.header).hexdigest()[:16]

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """In the order of the data."""
        return tuple(self._cut())

    def _cut(self) -> Iterator[Slice]:
        index = 0
        for number, info in enumerate(self.tensors):
            for start in range(0, info.nbytes, SLICE):
                stop = min(start + SLICE, info.nbytes)
                yield Slice(index, number, start, stop, info.offset + start)
                index += 1

    @cached_property
    def _offsets(self) -> list[int]:
        return [piece.offset for piece in self.slices]

    def slices_at(self, start: int, stop: int) -> Iterator[Slice]:
        """Those that hold bytes start..stop of the data section."""
        if start >= stop:
            return
        for index in range(max(0, bisect.bisect_right(self._offsets, start) - 1), len(self.slices)):
            if self.slices[index].offset >= stop:
                return
            yield self.slices[index]

    def difference(self, other: Layout) -> str:
        """In words, where another layout differs first; "" where it does not."""
        mine, theirs = ({t.name: (t.dtype, t.shape) for t in layout.tensors} for layout in (self, other))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return f"{name} is {_words(mine.get(name))} here, {_words(theirs.get(name))} there"
        return "" if self.header == other.header else "the order of the tensors differs"


def _words(found: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{found[0]} {list(found[1])}" if found else "missing"
