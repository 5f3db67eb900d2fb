"""Tensors that several senders hold in parts, cut into buckets and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mgrpo.engines.vllm.plugin.buckets import Assembler, Stream, StreamTensor
from mgrpo.errors import CorruptionError

DTYPES = ("float32", "bfloat16", "float16", "int64", "uint8", "bool")


@st.composite
def divided(draw: Any) -> tuple[list[StreamTensor], int, int]:
    """Tensors of any shape, unevenly divided among senders, some of whom hold nothing; and a limit."""
    senders = draw(st.integers(1, 4))
    tensors = []
    for number in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        size = torch.Size(shape).numel()
        inner = sorted(draw(st.lists(st.integers(0, size), min_size=senders - 1, max_size=senders - 1)))
        dtype = draw(st.sampled_from(DTYPES))
        tensors.append(StreamTensor(f"t{number}", dtype, shape, (*inner, size)))
    return tensors, senders, draw(st.integers(16, 600))


def part(whole: Tensor, tensor: StreamTensor, sender: int) -> Tensor:
    return whole.reshape(-1)[tensor.ends[sender - 1] if sender else 0 : tensor.ends[sender]]


def transfer(stream: Stream, wholes: list[Tensor]) -> dict[str, Tensor]:
    """Through messages of all senders; what an assembler has between two buckets is bounded on the way."""
    assembler, out = Assembler(stream), {}
    for bucket in range(len(stream.buckets)):
        total = 0
        for sender in range(stream.senders):
            held = [part(w, t, sender) for w, t in zip(wholes, stream.tensors, strict=True)]
            buffer = torch.full((stream.largest_message(sender),), 255, dtype=torch.uint8)
            message = stream.pack(bucket, sender, held.__getitem__, buffer)
            total += max(len(message) - 8, 0)
            assembler.unpack(bucket, sender, message)
            message.fill_(255)  # the next bucket comes into the same memory
        assert 0 < total <= stream.limit
        out |= dict(assembler.complete())
        assert len(assembler._open) <= 1
    out |= dict(assembler.complete())
    assert assembler.is_done
    return out


@settings(max_examples=200, deadline=None)
@given(divided(), st.integers(0, 2**31))
def test_what_is_put_together_is_what_was_divided(
    case: tuple[list[StreamTensor], int, int], seed: int
) -> None:
    """Bit for bit, in order, whatever the cuts; no bucket exceeds the limit, and nothing but one tensor is kept."""
    tensors, senders, limit = case
    torch.manual_seed(seed)
    wholes = [
        torch.randint(0, 256, (torch.Size(t.shape).numel() * t.torch_dtype.itemsize,), dtype=torch.uint8)
        .bitwise_and(1 if t.dtype == "bool" else 255)
        .view(t.torch_dtype)
        .view(t.shape)
        for t in tensors
    ]
    out = transfer(Stream(tensors, senders, limit), wholes)
    assert list(out) == [t.name for t in tensors]
    for tensor, whole in zip(tensors, wholes, strict=True):
        got = out[tensor.name]
        assert got.shape == whole.shape and got.dtype == whole.dtype
        assert torch.equal(got.reshape(-1).view(torch.uint8), whole.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_senders_round_as_a_cast_does(dtype: str) -> None:
    """Whatever a sender holds a tensor in, what arrives are the bits of `.to(dtype)` of it."""
    tensor = StreamTensor("w", dtype, (7, 5), (10, 10, 35))
    stream = Stream([tensor], 3, 40)
    for own in (torch.float32, torch.bfloat16):
        whole = torch.randn(7, 5).to(own)
        assert torch.equal(transfer(stream, [whole])["w"], whole.to(tensor.torch_dtype))


def test_a_flipped_byte_is_found_out() -> None:
    """Anywhere in a message, its sum included; and a message of another bucket is none of this one."""
    stream = Stream([StreamTensor("w", "float32", (6,), (6,))], 1, 1000)
    whole = torch.arange(6, dtype=torch.float32)
    buffer = torch.empty(stream.largest_message(0), dtype=torch.uint8)
    for place in range(len(buffer)):
        message = stream.pack(0, 0, lambda _: whole, buffer)
        message[place] ^= 64
        with pytest.raises(CorruptionError, match="bucket 0: the message of sender 0"):
            Assembler(stream).unpack(0, 0, message)


@pytest.mark.parametrize(
    ("ends", "reason"), [((2, 5), "up to"), ((5, 4, 6), "up to"), ((6,), "up to"), ((7, 6), "up to")]
)
def test_ends_that_do_not_fit_are_refused(ends: tuple[int, ...], reason: str) -> None:
    """Too few elements, too many senders, a step back: an error that names the tensor."""
    with pytest.raises(ValueError, match=rf"^w: 2 senders cannot hold 6 elements {reason}"):
        Stream([StreamTensor("w", "float32", (6,), ends)], 2)
    with pytest.raises(ValueError, match=r"w: dtype 'float77'"):
        Stream([StreamTensor("w", "float77", (6,), (3, 6))], 2)
    with pytest.raises(ValueError, match="limit 8 must be at least 16"):
        Stream([], 1, 8)
