"""A model's tensors as they travel from several senders: one stream, cut into buckets of bounded size.

Each sender holds consecutive elements of a tensor, as FSDP divides dim 0 (some none, one all); a bucket holds the next
`limit` bytes of the stream, whoever holds them. Sender s packs what it has of a bucket into one message, in the dtype
in which the tensors travel, and a receiver puts the messages of all senders together:

    message = cut, cut, ...   each aligned to 8 bytes
              sum             int64, of all before it as int64 numbers: a flipped byte is found out

Both sides derive the same cuts from the same list of tensors. Plain torch: this file also runs in the servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgrpo.errors import CorruptionError

BUCKET = 256 << 20  # bytes of a bucket at most
_ALIGN = 8
_SUM = 8  # bytes at the end of a message


@dataclass(frozen=True, slots=True)
class StreamTensor:
    """One tensor of the stream. ends: sender s holds elements ends[s - 1] (0 for the first) to ends[s] - 1 of it,
    flattened. dtype: what it travels in, a name of torch's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{self.name}: dtype {self.dtype!r} is none of torch's")
        return found


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements start to stop - 1 of a flattened tensor (its number in the stream), at `offset` bytes of the message of
    `sender`."""

    tensor: int
    start: int
    stop: int
    sender: int
    offset: int


class Stream:
    """The tensors in their order, and the buckets that they make. Raises ValueError where the ends of a tensor do not
    fit its shape."""

    def __init__(self, tensors: Sequence[StreamTensor], senders: int, limit: int = BUCKET) -> None:
        """limit: bytes of a bucket, all senders together."""
        if limit < 2 * _ALIGN:
            raise ValueError(f"limit {limit} must be at least {2 * _ALIGN} bytes")
        self.tensors, self.senders, self.limit = tuple(tensors), senders, limit
        for tensor in self.tensors:
            if (
                len(tensor.ends) != senders
                or tensor.ends[-1] != tensor.size
                or any(a > b for a, b in zip((0, *tensor.ends), tensor.ends, strict=False))
            ):
                raise ValueError(
                    f"{tensor.name}: {senders} senders cannot hold {tensor.size} elements up to {tensor.ends}"
                )
        self.buckets: list[list[Cut]] = list(self._cut())

    def _cut(self) -> Iterator[list[Cut]]:
        bucket: list[Cut] = []
        used = [0] * self.senders  # bytes of each sender's message
        for number, tensor in enumerate(self.tensors):
            width, done = tensor.torch_dtype.itemsize, 0
            for sender, end in enumerate(tensor.ends):
                while done < end:
                    free = (self.limit - sum(used)) // _ALIGN * _ALIGN
                    if not (count := min(end - done, free // width)):
                        yield bucket
                        bucket, used = [], [0] * self.senders
                        continue
                    bucket.append(Cut(number, done, done + count, sender, used[sender]))
                    used[sender] += _aligned(count * width)
                    done += count
        if bucket:
            yield bucket

    def message_size(self, bucket: int, sender: int) -> int:
        """Bytes that `sender` sends in a bucket; 0 where it holds nothing of it."""
        mine = [cut for cut in self.buckets[bucket] if cut.sender == sender]
        if not mine:
            return 0
        last = mine[-1]
        width = self.tensors[last.tensor].torch_dtype.itemsize
        return last.offset + _aligned((last.stop - last.start) * width) + _SUM

    def largest_message(self, sender: int) -> int:
        """Bytes of the longest message of `sender`."""
        return max((self.message_size(bucket, sender) for bucket in range(len(self.buckets))), default=0)

    def pack(self, bucket: int, sender: int, held: Callable[[int], Tensor], buffer: Tensor) -> Tensor:
        """The message of `sender`, at the beginning of `buffer` (u8). held(i): what it holds of tensor i, flattened, of
        any dtype and device; it is rounded to the dtype of the stream."""
        message = buffer[: self.message_size(bucket, sender)]
        if not len(message):
            return message
        for cut in self.buckets[bucket]:
            if cut.sender == sender:
                begin = self.tensors[cut.tensor].ends[sender - 1] if sender else 0
                self._view(message, cut).copy_(held(cut.tensor)[cut.start - begin : cut.stop - begin])
        message[-_SUM:].view(torch.int64).copy_(_sum(message))
        return message

    def _view(self, message: Tensor, cut: Cut) -> Tensor:
        dtype = self.tensors[cut.tensor].torch_dtype
        return message[cut.offset : cut.offset + (cut.stop - cut.start) * dtype.itemsize].view(dtype)


class Assembler:
    """Puts the tensors of a stream together, bucket after bucket. At most one tensor lies in it between two buckets."""

    def __init__(self, stream: Stream, device: torch.device | str = "cpu") -> None:
        self._stream, self._device = stream, torch.device(device)
        self._next = 0  # the first tensor that is not complete
        self._open: dict[int, tuple[Tensor, int]] = {}  # tensor -> (its elements, how many of them are there)

    def unpack(self, bucket: int, sender: int, message: Tensor) -> None:
        """Take the elements out of the message of `sender`, which may be overwritten afterwards. Raises CorruptionError
        where its sum is wrong."""
        if not len(message):
            return
        if int(_sum(message)) != int(message[-_SUM:].view(torch.int64)):
            raise CorruptionError(f"bucket {bucket}: the message of sender {sender} does not match its sum")
        for cut in self._stream.buckets[bucket]:
            if cut.sender == sender:
                whole, there = self._open.get(cut.tensor) or (self._empty(cut.tensor), 0)
                whole[cut.start : cut.stop].copy_(self._stream._view(message, cut))
                self._open[cut.tensor] = whole, there + cut.stop - cut.start

    def complete(self) -> list[tuple[str, Tensor]]:
        """The tensors that are whole now and were not before, in the order of the stream."""
        found = []
        while self._next < len(self._stream.tensors):
            tensor = self._stream.tensors[self._next]
            whole, there = self._open.get(self._next, (None, 0))
            if there < tensor.size:
                break
            self._open.pop(self._next, None)
            whole = self._empty(self._next) if whole is None else whole  # of no element
            found.append((tensor.name, whole.view(tensor.shape)))
            self._next += 1
        return found

    @property
    def is_done(self) -> bool:
        """Whether complete() has returned every tensor."""
        return self._next == len(self._stream.tensors)

    def _empty(self, number: int) -> Tensor:
        tensor = self._stream.tensors[number]
        return torch.empty(tensor.size, dtype=tensor.torch_dtype, device=self._device)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _sum(message: Tensor) -> Tensor:
    return message[:-_SUM].view(torch.int64).sum()
