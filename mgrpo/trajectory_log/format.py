"""The bytes of a trajectory log.

    segment = 16-byte head, then records
    record  = magic u32 | meta length u32 | payload length u64 | crc32c u32 | 0 u32 | meta | payload
    payload = tokens i32[n] | logprobs f32[n] | versions i32[n] | experts [n, N, k] | loss_mask u8[n], little-endian

Experts are u8 or u16, and there only with routing replay: meta then ends in N, k and the bytes of one number.

A segment of the log is a file. Where the segments of a trajectory begin is in its meta; where an older log has nothing
there, it is one. Record, meta and payload each begin at a multiple of 8 bytes, so the arrays are aligned in the file
and in what is read.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt

from mgrpo.errors import CorruptionError
from mgrpo.transport import codec
from mgrpo.transport.codec import ArraySpec, BadMessage, Buffer, Count, Name, Record, Scores, Small
from mgrpo.types import Experts, Trajectory, segment_slices

KIND = b"mgrpo traj "
FORMAT = b"3"
HEAD = KIND + FORMAT + b"\n\0\0\0"
FRAME = struct.Struct("<IIQII")
MAGIC = 0x50534D47
MAGIC_BYTES = struct.pack("<I", MAGIC)
MAX_META = 1 << 20  # bytes
ARRAYS = {"tokens": "<i4", "logprobs": "<f4", "versions": "<i4", "loss_mask": "|u1"}
ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in ARRAYS.items()}
PER_TOKEN = sum(ITEM_BYTES.values())
EXPERTS: dict[int, np.dtype[Any]] = {1: np.dtype("|u1"), 2: np.dtype("<u2")}
"""Their dtypes, by bytes."""
MAX_EXPERTS = 48 << 20
"""Bytes of one trajectory's, so that it fits one message."""
_PIECE = 8 << 20  # bytes of them in one frame


class LogRef(Record):
    """Where a trajectory lies: segment and byte offset in its role's trajectory log, payload length and crc32c."""

    role: Name
    segment: Count
    offset: Count
    length: Count
    crc: Count


class Meta(Record):
    query: Name
    rollout: Small
    role: Name
    invocation: Small
    attempt: Count
    index: Count
    scores: Scores
    n: Count
    segment_starts: tuple[Count, ...] = (0,)
    experts: tuple[Small, ...] = ()
    """N, k, bytes of one number; () for a trajectory without."""

    def encoded(self) -> bytes:
        """As the log keeps it: without experts just as before there were any."""
        fields = msgspec.structs.astuple(self)
        return codec.encode(fields if self.experts else fields[:-1])

    @property
    def token_bytes(self) -> int:
        """Of the payload, for each token."""
        return PER_TOKEN + (math.prod(self.experts) if self.experts else 0)


class Append(Record):
    meta: Meta
    arrays: dict[Name, ArraySpec]


def mapped(path: Path) -> memoryview:
    """The file's bytes, read page by page as they are touched."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def read_bytes(file: io.RawIOBase, size: int) -> memoryview:
    """The next `size` bytes, or those up to the file's end, at an aligned address: numpy aligns what it allocates."""
    buffer = np.empty(size, np.uint8).data
    filled = 0
    while filled < size and (got := file.readinto(buffer[filled:])):
        filled += got
    return buffer[:filled].toreadonly()


def padding(length: int) -> int:
    return -length % 8


def payload_offset(meta_length: int) -> int:
    """Where a record's payload begins, from the record's own beginning."""
    return FRAME.size + meta_length + padding(meta_length)


def next_record(view: memoryview, at: int) -> tuple[int, tuple[Meta, int, int, int]] | None:
    """(start, what parse_record says of it) of the first whole record at or behind `at`; None when there is none."""
    data: Any = view.obj  # bytes or a map: both can search
    while (found := parse_record(view, at)) is None:
        at = data.find(MAGIC_BYTES, at + 1)
        while at % 8 and at >= 0:
            at = data.find(MAGIC_BYTES, at + 1)
        if at < 0:
            return None
    return at, found


def parse_record(view: memoryview, at: int) -> tuple[Meta, int, int, int] | None:
    """(meta, crc, payload length, where the next record starts) of the record at `at`, or None when it is not
    whole."""
    if at + FRAME.size > len(view):
        return None
    magic, meta_length, length, crc, _ = FRAME.unpack_from(view, at)
    body = at + FRAME.size
    end = at + payload_offset(meta_length) + length
    if magic != MAGIC or end > len(view):
        return None
    if google_crc32c.value(bytes(view[body:end])) != crc:
        return None
    meta = codec.decode(view[body : body + meta_length], Meta)
    return meta, crc, length, end + padding(end - at)


def checked_payload(body: Append, frames: Sequence[Buffer]) -> bytes:
    """The canonical payload of an append request; raises BadMessage for anything that is not a trajectory."""
    meta = body.meta
    codec.check_names([meta.query, *meta.scores])
    codec.check_finite("score", meta.scores.values())
    pieces = [f"experts.{i}" for i in range(len(body.arrays) - len(ARRAYS))] if meta.experts else []
    if set(body.arrays) != {*ARRAYS, *pieces}:
        raise BadMessage(f"arrays {sorted(body.arrays)}, expected {sorted(ARRAYS)}")
    arrays = codec.unpack_arrays(body.arrays, frames)
    for name, dtype in ARRAYS.items():
        if arrays[name].shape != (meta.n,) or arrays[name].dtype != np.dtype(dtype):
            raise BadMessage(
                f"{name} is {arrays[name].dtype}{arrays[name].shape}, expected {dtype}({meta.n},)"
            )
    if not np.isfinite(arrays["logprobs"]).all():
        raise BadMessage("log-probs are not finite")
    if meta.n and arrays["loss_mask"].max() > 1:
        raise BadMessage("loss_mask holds more than 0 and 1")
    _check_segments(meta, arrays["loss_mask"])
    parts = {name: arrays[name].tobytes() for name in ARRAYS}
    experts = _checked_experts(meta, [arrays[name] for name in pieces])
    return b"".join((parts["tokens"], parts["logprobs"], parts["versions"], *experts, parts["loss_mask"]))


def split_experts(experts: Experts) -> dict[str, Experts]:
    """As the arrays of an append request, each of which fits a frame."""
    rows = max(1, _PIECE // max(1, math.prod(experts.shape[1:]) * experts.itemsize))
    starts = range(0, max(1, len(experts)), rows)
    return {f"experts.{i}": experts[start : start + rows] for i, start in enumerate(starts)}


def _checked_experts(meta: Meta, pieces: Sequence[npt.NDArray[Any]]) -> list[bytes]:
    if not meta.experts:
        return []
    if len(meta.experts) != 3 or meta.experts[2] not in EXPERTS or not all(meta.experts):
        raise BadMessage(f"experts of {meta.experts}, expected routers, experts a token, and 1 or 2 bytes")
    shape, dtype = meta.experts[:2], EXPERTS[meta.experts[2]]
    for piece in pieces:
        if piece.ndim != 3 or piece.shape[1:] != shape or piece.dtype != dtype:
            raise BadMessage(f"experts are {piece.dtype}{piece.shape}, expected {dtype.str}(tokens, {shape})")
    if (found := sum(map(len, pieces))) != meta.n:
        raise BadMessage(f"experts of {found} tokens, expected {meta.n}")
    if (size := meta.n * math.prod(meta.experts)) > MAX_EXPERTS:
        raise BadMessage(f"experts of {size} bytes, the limit is {MAX_EXPERTS}")
    return [piece.tobytes() for piece in pieces]


def _check_segments(meta: Meta, loss_mask: npt.NDArray[np.uint8]) -> None:
    """Starts in order; behind the first, each segment with context before what it sampled, and with a sampled token."""
    try:
        slices = segment_slices(meta.segment_starts, meta.n)
    except ValueError as error:
        raise BadMessage(str(error)) from None
    for place in slices if len(slices) > 1 else ():
        if place.start and loss_mask[place.start]:
            raise BadMessage(f"the segment at {place.start} begins with a sampled token, expected context")
        if not loss_mask[place].any():
            raise BadMessage(
                f"the segment at {place.start} has no sampled token among {place.stop - place.start}"
            )


def trajectory(meta: Meta, payload: Buffer) -> Trajectory:
    """A trajectory whose arrays are views of payload."""
    if len(payload) != meta.n * meta.token_bytes:
        raise CorruptionError(f"payload of {len(payload)} bytes for {meta.n} tokens")
    views: dict[str, Any] = {}
    at = 0
    for name, dtype in ARRAYS.items():
        if name == "loss_mask" and meta.experts:  # behind the arrays of four bytes: aligned
            routers, chosen, size = meta.experts
            flat = np.frombuffer(payload, EXPERTS[size], meta.n * routers * chosen, at)
            views["experts"] = flat.reshape(meta.n, routers, chosen)
            at += flat.nbytes
        views[name] = np.frombuffer(payload, dtype, meta.n, at)
        at += meta.n * ITEM_BYTES[name]
    return Trajectory(
        meta.query, meta.rollout, meta.role, meta.invocation, scores=dict(meta.scores),
        segment_starts=meta.segment_starts, **views,
    )  # fmt: skip
