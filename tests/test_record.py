"""The record's files: bounded, readable while they grow, and never wrong where they are torn or damaged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from mgrpo.config.run import RecordConfig
from mgrpo.errors import CorruptionError
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.segments import SEGMENTS, SegmentReader, SegmentWriter
from mgrpo.types import Rollout, Trajectory


def trajectory(role: str, invocation: int, n: int, versions: tuple[int, int] = (4, 4)) -> Trajectory:
    """n tokens, the odd ones sampled; the last of them by another version where the two differ."""
    rng = np.random.default_rng(n)
    mask = (np.arange(n) % 2).astype(np.uint8)
    version = np.where(mask != 0, versions[0], -1).astype(np.int32)
    version[np.flatnonzero(mask)[-1]] = versions[1]
    return Trajectory(
        query="0/0", rollout=1, role=role, invocation=invocation,
        tokens=rng.integers(0, 50, n).astype(np.int32), loss_mask=mask,
        logprobs=(-rng.random(n) * mask).astype(np.float32), versions=version, scores={"format": 1.0},
    )  # fmt: skip


def rollout() -> Rollout:
    subs = [trajectory("sub", 0, 9), trajectory("sub", 1, 12, (3, 4))]
    return Rollout("0/0", 1, trajectory("main", 0, 7), {"sub": subs}, 0.5, {"answer": "Suva", "odd": {1, 2}})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every array of every trajectory comes back to the last bit, versions of two kinds included."""
    recorder = RolloutRecorder(RecordConfig(), tmp_path / "rollouts" / "0", print)
    original = rollout()
    recorder.train(0, 0, "0/0", 1, ("capital of Fiji", "Suva"), original, "")
    recorder.train(0, 0, "0/0", 2, ("capital of Fiji", "Suva"), None, "the engine is down")
    recording = Recording([tmp_path])
    found = recording.rollouts["0/0/1"]
    assert found.head.d_k == {"sub": 2} and found.head.tokens == {"main": 7, "sub": 21}
    assert (found.head.question, found.head.gold, found.head.answer) == ("capital of Fiji", "Suva", "Suva")
    for record, given in zip(
        found.body().trajectories, [original.main, *original.invocations["sub"]], strict=True
    ):
        back = record.trajectory("0/0", 1)
        for name in ("tokens", "loss_mask", "logprobs", "versions"):
            assert getattr(back, name).tobytes() == getattr(given, name).tobytes(), name
            assert getattr(back, name).dtype == getattr(given, name).dtype
    failed = recording.rollouts["0/0/2"]
    assert failed.head.status == "failed" and failed.body().failure == "the engine is down"


def test_a_reader_follows_a_writer_and_stops_at_a_torn_frame(tmp_path: Path) -> None:
    """New frames appear, each once; a frame that is not whole yet does not, and does once it is."""
    writer, reader = SegmentWriter(tmp_path, 1 << 20), SegmentReader(tmp_path)
    assert list(reader.fresh()) == []
    writer.append(b"one", b"body of one")
    assert [f.head for f in reader.fresh()] == [b"one"]
    assert list(reader.fresh()) == []
    writer.append(b"two", b"body of two")
    path = next(tmp_path.glob("*.rec"))
    whole = path.read_bytes()
    for cut in range(len(whole) - 40, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(reader.fresh()) == []
    path.write_bytes(whole)
    assert [(f.head, f.body()) for f in reader.fresh()] == [(b"two", b"body of two")]


def test_a_restarted_writer_leaves_the_torn_end_behind(tmp_path: Path) -> None:
    """A process that died in a write costs that frame only; its successor's frames are all there."""
    first = SegmentWriter(tmp_path, 1 << 20)
    first.append(b"one", b"1")
    first.append(b"torn", b"2")
    first.close()
    path = next(tmp_path.glob("*.rec"))
    path.write_bytes(path.read_bytes()[:-1])
    second = SegmentWriter(tmp_path, 1 << 20)
    second.append(b"three", b"3")
    assert [f.head for f in SegmentReader(tmp_path).fresh()] == [b"one", b"three"]


def test_damage_is_named(tmp_path: Path) -> None:
    """A flipped bit in a body is found when it is opened; a file of another kind is refused."""
    writer = SegmentWriter(tmp_path, 1 << 20)
    writer.append(b"one", b"body of one")
    path = next(tmp_path.glob("*.rec"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    (frame,) = SegmentReader(tmp_path).fresh()
    with pytest.raises(CorruptionError, match=path.name):
        frame.body()


def test_the_bound_holds_and_the_start_stays(tmp_path: Path) -> None:
    """However much is written, the folder stays below its bound, and the first and the last frames are in it."""
    bound = 64_000
    writer = SegmentWriter(tmp_path, bound)
    for number in range(2000):
        writer.append(f"{number}".encode(), bytes(100 + number % 50))
        if number % 100 == 0:
            assert sum(p.stat().st_size for p in tmp_path.glob("*.rec")) <= bound
    heads = [int(f.head) for f in SegmentReader(tmp_path).fresh()]
    assert heads[0] == 0 and heads[-1] == 1999 and heads == sorted(heads)
    assert len(list(tmp_path.glob("*.rec"))) <= SEGMENTS


def test_tokens_are_sampled_and_recording_can_be_off(tmp_path: Path) -> None:
    """tokens_every keeps the tokens of every n-th step and the numbers of all; enabled = false writes nothing."""
    recorder = RolloutRecorder(RecordConfig(tokens_every=3), tmp_path / "rollouts" / "0", print)
    for step in range(7):
        recorder.train(step, step, f"{step}/{step}", 0, ("q", "a"), rollout(), "")
    recording = Recording([tmp_path])
    kept = [bool(r.body().trajectories[0].tokens) for r in recording.rollouts.values()]
    assert kept == [True, False, False, True, False, False, True]
    assert all(r.body().trajectories[2].n == 12 for r in recording.rollouts.values())
    silent = RolloutRecorder(RecordConfig(enabled=False), tmp_path / "off" / "rollouts" / "0", print)
    silent.train(0, 0, "0/0", 0, ("q", "a"), rollout(), "")
    assert not (tmp_path / "off").exists()


def test_a_record_is_plain_messagepack(recorded: Path) -> None:
    """Another library reads what a run has recorded."""
    import msgpack

    for frame in SegmentReader(recorded / "rollouts" / "0").fresh():
        body = msgpack.unpackb(frame.body())
        assert msgpack.unpackb(frame.head)["type"] == "rollout"
        assert [t["role"] for t in body["trajectories"][:1]] in ([], ["main"])
        assert msgspec.msgpack.decode(frame.body()) == body
