"""What a message is, without any socket: a MessagePack header and raw little-endian frames.

    message = [ header | frame | frame | ... ]
    header  = MessagePack [protocol, sender, [item, ...]]
    sender  = [run digest, role, name, session]
    item    = [id, name, body, frames, framed]

One message carries many items; `name` is the method of a request and the status of an answer ("ok" or an
error code). `frames` is how many of the message's frames belong to the item, in order. A body too large for a
header travels as the item's first frame (`framed`). Headers are plain MessagePack, no extension types,
readable by any library; numbers in bulk never enter a header: arrays travel as frames, joined and copied
below JOIN_BELOW bytes, on their own above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

PROTOCOL = 1
OK = "ok"
JOIN_BELOW = 64 << 10
MAX_STRING = 256  # bytes
MAX_INT = (1 << 62) - 1

Name = Annotated[str, msgspec.Meta(max_length=MAX_STRING)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
Signed = Annotated[int, msgspec.Meta(ge=-MAX_INT, le=MAX_INT)]
Small = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Scores = dict[Name, float]
Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

_DTYPES = {"|u1", "|i1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"}


class Record(msgspec.Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base of every request and answer body: a MessagePack array in the order of the fields."""


class BadMessage(ValueError):
    """The bytes are not a message of this protocol; the text says why."""


class Refusal(Exception):
    """A named refusal, sent to the peer with its code and message. Nothing was stored."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds in bytes on what is sent and accepted. A peer that breaks them is refused, never obeyed."""

    header: int = 64 << 10
    frame: int = 16 << 20
    message: int = 64 << 20


class Sender(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Who speaks. It travels with every message, so a reconnected peer needs no handshake of its own."""

    run: Name = ""
    role: Name = ""
    name: Name = ""
    session: Name = ""


class Item(msgspec.Struct, array_like=True, gc=False):
    id: Count
    name: Name
    body: msgspec.Raw
    frames: Count = 0
    framed: bool = False


class Batch(msgspec.Struct, array_like=True, gc=False):
    protocol: Count
    sender: Sender
    items: list[Item]


class ArraySpec(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """dtype in numpy's little-endian notation, shape, and where the bytes start in which frame."""

    dtype: Name
    shape: tuple[Count, ...]
    frame: Count
    offset: Count


_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(Batch)
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def encode(value: object) -> bytes:
    """MessagePack of a struct, list, dict, string, bytes or number."""
    return _encoder.encode(value)


def decode(data: Buffer | msgspec.Raw, kind: type[T]) -> T:
    """The value of type `kind` in `data`; raises BadMessage naming what does not fit."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value: T = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"{getattr(kind, '__name__', kind)}: {error}") from None
    return value


def encode_batch(sender: Sender, items: list[Item]) -> bytes:
    return _encoder.encode(Batch(PROTOCOL, sender, items))


def decode_batch(header: Buffer, n_frames: int, limits: Limits) -> Batch:
    """The header's items; raises BadMessage when it is malformed, too large or does not account for every
    frame."""
    if len(header) > limits.header:
        raise BadMessage(f"header of {len(header)} bytes, the limit is {limits.header}")
    try:
        batch = _batch_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"header: {error}") from None
    if batch.protocol != PROTOCOL:
        raise BadMessage(f"protocol {batch.protocol}, this side speaks {PROTOCOL}")
    named = sum(item.frames for item in batch.items)
    if named != n_frames:
        raise BadMessage(f"header names {named} frames, the message has {n_frames}")
    if any(item.framed and not item.frames for item in batch.items):
        raise BadMessage("an item says that its body is a frame and has none")
    return batch


def body_of(item: Item, frames: Sequence[Buffer]) -> tuple[Buffer, list[Buffer]]:
    """(body bytes, payload frames) of one item, given its own frames."""
    if item.framed:
        return frames[0], list(frames[1:])
    return bytes(item.body), list(frames)


def check_names(names: Iterable[str]) -> None:
    """Raise BadMessage for a name that is longer than MAX_STRING bytes once encoded."""
    for name in names:
        if len(name) * 4 > MAX_STRING and len(name.encode()) > MAX_STRING:
            raise BadMessage(f"string of {len(name.encode())} bytes, the limit is {MAX_STRING}")


def check_finite(what: str, values: Iterable[float]) -> None:
    """Raise BadMessage for NaN or infinity."""
    for value in values:
        if not math.isfinite(value):
            raise BadMessage(f"{what} is {value}, only finite numbers are accepted")


def pack_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[dict[str, ArraySpec], list[Buffer]]:
    """(specs, frames): arrays below JOIN_BELOW bytes share frame 0, larger ones are frames of their own, not
    copied."""
    specs: dict[str, ArraySpec] = {}
    joined = bytearray()
    large: list[Buffer] = []
    has_small = any(a.nbytes < JOIN_BELOW for a in arrays.values())
    for name, array in arrays.items():
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        dtype = little.dtype.str
        if dtype not in _DTYPES:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, expected one of {sorted(_DTYPES)}")
        if little.nbytes < JOIN_BELOW:
            joined += b"\0" * (-len(joined) % little.itemsize)  # views of aligned data need no copy
            specs[name] = ArraySpec(dtype, little.shape, 0, len(joined))
            joined += little.tobytes()
        else:
            specs[name] = ArraySpec(dtype, little.shape, len(large) + has_small, 0)
            large.append(little.view(np.uint8).reshape(-1).data)
    return specs, ([joined] if has_small else []) + large


def unpack_arrays(specs: Mapping[str, ArraySpec], frames: Sequence[Buffer]) -> dict[str, npt.NDArray[Any]]:
    """Views of the frames, one per spec; raises BadMessage when a spec does not fit its frame."""
    out: dict[str, npt.NDArray[Any]] = {}
    for name, spec in specs.items():
        if spec.dtype not in _DTYPES:
            raise BadMessage(f"array {name!r} has dtype {spec.dtype!r}")
        count = math.prod(spec.shape)
        dtype = np.dtype(spec.dtype)
        if spec.frame >= len(frames) or spec.offset + count * dtype.itemsize > len(frames[spec.frame]):
            raise BadMessage(f"array {name!r} {spec.shape} reaches beyond its frame")
        flat = np.frombuffer(frames[spec.frame], dtype, count, spec.offset)
        out[name] = flat.reshape(spec.shape)
    return out
