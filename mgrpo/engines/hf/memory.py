"""A tensor of the engine's model as the bytes of its slices, wherever and however it lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from mgrpo.weights.dtypes import bits_dtype
from mgrpo.weights.layout import Slice
from mgrpo.weights.patch import Bytes, Change


class Memory(ABC):
    """One tensor. Slices are of its elements in row-major order."""

    @abstractmethod
    def read(self, piece: Slice) -> Bytes:
        """A slice's bytes, in main memory."""

    @abstractmethod
    def write(self, piece: Slice, data: Bytes) -> None:
        """Replace a slice's bytes."""

    @abstractmethod
    def apply(self, change: Change) -> None:
        """XOR a change into its slice. Raises CorruptionError, nothing having been changed."""


def memory_of(tensor: Tensor) -> Memory:
    """The tensor itself: what is written there is written to it."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        return Strided(tensor)
    return Host(tensor) if tensor.device.type == "cpu" else Device(tensor)


class Host(Memory):
    """Contiguous in main memory: nothing is copied but what changes."""

    def __init__(self, tensor: Tensor) -> None:
        self._bytes: Bytes = tensor.view(-1).view(torch.uint8).numpy()

    def read(self, piece: Slice) -> Bytes:
        return self._bytes[piece.start : piece.stop]

    def write(self, piece: Slice, data: Bytes) -> None:
        self._bytes[piece.start : piece.stop] = data

    def apply(self, change: Change) -> None:
        change.apply(self._bytes[change.slice.start : change.slice.stop])


class Device(Memory):
    """Contiguous on an accelerator: the changed elements alone go there."""

    def __init__(self, tensor: Tensor) -> None:
        self._flat, self._size = tensor.view(-1), tensor.element_size()

    def _slice(self, piece: Slice) -> Tensor:
        return self._flat[piece.start // self._size : piece.stop // self._size]

    def read(self, piece: Slice) -> Bytes:
        return _bytes(self._slice(piece).cpu())

    def write(self, piece: Slice, data: Bytes) -> None:
        host = torch.empty((piece.stop - piece.start) // self._size, dtype=self._flat.dtype)
        _bytes(host)[:] = data
        self._slice(piece).copy_(host)

    def apply(self, change: Change) -> None:
        where, bits = change.entries()
        integers = bits_dtype(self._size)
        here = self._slice(change.slice).view(integers)
        index = torch.from_numpy(where).to(here.device)
        flips = torch.from_numpy(bits.astype(str(integers).removeprefix("torch."))).to(here.device)
        here[index] = here[index] ^ flips


class Strided(Memory):
    """Cut out of another tensor, as one expert's weights of a fused tensor may be: a copy of the slice is changed and
    put back."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._size = tensor, tensor.element_size()

    def _parts(self, piece: Slice) -> Iterator[Tensor]:
        return parts_of(self._tensor, piece.start // self._size, piece.stop // self._size)

    def read(self, piece: Slice) -> Bytes:
        return _bytes(torch.cat([part.reshape(-1) for part in self._parts(piece)]).cpu())

    def write(self, piece: Slice, data: Bytes) -> None:
        host = torch.empty((piece.stop - piece.start) // self._size, dtype=self._tensor.dtype)
        _bytes(host)[:] = data
        at = 0
        for part in self._parts(piece):
            part.copy_(host[at : at + part.numel()].view(part.shape))
            at += part.numel()

    def apply(self, change: Change) -> None:
        data = self.read(change.slice)
        change.apply(data)
        self.write(change.slice, data)


def parts_of(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Views that hold elements start..stop of a tensor in row-major order, one after the other."""
    if tensor.dim() <= 1:
        yield tensor.reshape(-1)[start:stop]
        return
    row = tensor[0].numel()
    while start < stop:
        index, inside = divmod(start, row)
        rows = (stop - start) // row
        if inside == 0 and rows:
            yield tensor[index : index + rows]
            start += rows * row
        else:
            end = min(stop, (index + 1) * row)
            yield from parts_of(tensor[index], inside, end - index * row)
            start = end


def _bytes(tensor: Tensor) -> Bytes:
    """Of a contiguous tensor (n,) in main memory, sharing it."""
    found: Bytes = tensor.view(torch.uint8).numpy()
    return found
