"""The wire format: plain MessagePack headers that any library reads, arrays as little-endian frames."""

from __future__ import annotations

import msgpack
import msgspec
import numpy as np
import pytest

from mgrpo.store import records as rec
from mgrpo.transport import codec
from mgrpo.transport.codec import ArraySpec, BadMessage, Item, Limits, Sender
from mgrpo.transport.server import pack


def test_headers_are_standard_messagepack() -> None:
    """The msgpack package reads a message of two requests, and what it writes is read here."""
    final = rec.RolloutFinal("7/3", 1, 0, 0.5, 1.0, {"sub": 0}, {"format": 1.0}, 4, 5)
    items = [(1, "rollout_final", codec.encode(final), ()), (2, "stats", codec.encode(None), (b"x", b"y"))]
    ((header, frames),) = pack(items, Sender("digest", "worker", "w", "s"))
    body = ["7/3", 1, 0, 0.5, 1.0, {"sub": 0}, {"format": 1.0}, 4, 5, "ok"]
    assert msgpack.unpackb(header) == [
        1,
        ["digest", "worker", "w", "s"],
        [[1, "rollout_final", body, 0, False], [2, "stats", None, 2, False]],
    ]
    assert frames == [b"x", b"y"]
    back = codec.decode_batch(msgpack.packb(msgpack.unpackb(header)), 2, Limits())
    assert codec.decode(back.items[0].body, rec.RolloutFinal) == final


def test_large_bodies_travel_as_frames_and_headers_stay_small() -> None:
    """10,000 items are split so that every header is below the limit, in order."""
    big = codec.encode("x" * 100_000)
    items = [(i, "m", big if i % 1000 == 0 else codec.encode(i), ()) for i in range(10_000)]
    seen = []
    for header, frames in pack(items, Sender()):
        batch = codec.decode_batch(header, len(frames), Limits())
        at = 0
        for item in batch.items:
            body, payload = codec.body_of(item, frames[at : at + item.frames])
            at += item.frames
            assert payload == []
            assert bytes(body) == items[item.id][2]
            seen.append(item.id)
    assert seen == list(range(10_000))


@pytest.mark.parametrize("dtype", ["u1", "i4", "i8", "f2", "f4", "f8", ">i4", ">f8"])
@pytest.mark.parametrize("shape", [(0,), (3,), (7, 5), (200_000,)])
def test_arrays_come_back_bit_for_bit_as_views(dtype: str, shape: tuple[int, ...]) -> None:
    """Small ones joined and aligned, large ones on their own, big-endian ones converted."""
    rng = np.random.default_rng(1)
    arrays = {"a": rng.integers(0, 100, shape).astype(dtype), "odd": np.arange(3, dtype="u1"), "b": np.eye(2)}
    specs, frames = codec.pack_arrays(arrays)
    back = codec.unpack_arrays(specs, frames)
    for name, array in arrays.items():
        assert np.array_equal(back[name], array)
        assert back[name].dtype == array.dtype.newbyteorder("<")
        assert not back[name].flags.owndata
    if arrays["a"].nbytes < codec.JOIN_BELOW:
        assert len(frames) == 1
    with pytest.raises(TypeError, match="complex"):
        codec.pack_arrays({"a": np.zeros(2, complex)})


@pytest.mark.parametrize(
    "spec",
    [
        ArraySpec("<i4", (10**9, 10**9), 0, 0),
        ArraySpec("<i4", (4,), 0, 1),
        ArraySpec("<i4", (1,), 7, 0),
        ArraySpec("|O", (1,), 0, 0),
    ],
)
def test_specs_that_reach_beyond_their_frame_are_refused(spec: ArraySpec) -> None:
    """Sizes that overflow, offsets past the end, frames that are not there, Python objects."""
    with pytest.raises(BadMessage):
        codec.unpack_arrays({"a": spec}, [bytes(16)])


def test_malformed_headers_say_what_is_wrong() -> None:
    """Another protocol, frames that nobody names, too large, strings and numbers out of bounds."""
    good = codec.encode_batch(Sender(), [Item(1, "m", msgspec.Raw(b"\xc0"))])
    codec.decode_batch(good, 0, Limits())
    other = codec.encode([9, ["", "", "", ""], []])
    bad = {
        "protocol 9": (other, 0),
        "names 0 frames, the message has 2": (good, 2),
        "limit is 65536": (bytes(70_000), 0),
        "header": (b"\xff\x00", 0),
        "<= 256": (codec.encode([1, ["x" * 300, "", "", ""], []]), 0),
        "its body is a frame": (codec.encode([1, ["", "", "", ""], [[1, "m", None, 0, True]]]), 0),
    }
    for message, (header, frames) in bad.items():
        with pytest.raises(BadMessage, match=message):
            codec.decode_batch(header, frames, Limits())
    with pytest.raises(BadMessage, match=r"unexpected|length|expected"):
        codec.decode(codec.encode(["q", 1]), rec.RolloutFinal)
    with pytest.raises(BadMessage, match="256"):
        codec.check_names(["ä" * 200])
