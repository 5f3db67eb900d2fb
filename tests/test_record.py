"""The record's files: bounded, readable while they grow, and never wrong where they are torn or damaged."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mgrpo.config.record import RecordConfig
from mgrpo.errors import CorruptionError
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.schema import StepHead
from mgrpo.record.segments import SEGMENTS, SegmentReader, SegmentWriter
from mgrpo.types import Rollout, Trajectory
from tests.trace_check import check_trace


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


def test_damage_costs_only_what_it_hits(tmp_path: Path) -> None:
    """A destroyed frame, a segment of zeros and one of another kind: all whole frames are read, and each file that
    something was passed over in is named."""
    folder = tmp_path / "rollouts" / "0"
    recorder = RolloutRecorder(RecordConfig(), folder, print)
    for number in range(3):
        recorder.train(number, number, f"{number}/{number}", 0, ("q", "a"), rollout(), "")
    recorder.close()
    path = folder / "000001.rec"
    (_, second, _) = SegmentReader(folder).fresh()
    data = bytearray(path.read_bytes())
    data[second.offset - len(second.head) + 3] ^= 0xFF
    path.write_bytes(data)
    (folder / "000002.rec").write_bytes(bytes(4096))
    (folder / "000003.rec").write_bytes(b"something else entirely")
    recording = Recording([tmp_path])
    assert list(recording.rollouts) == ["0/0/0", "2/2/0"]
    assert recording.rollouts["2/2/0"].body().trajectories[0].n == 7
    named = "\n".join(recording.notes())
    assert all(f"{number:06d}.rec" in named for number in (1, 2, 3)) and "damaged from byte" in named


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "info",
    [
        {"answer": "half a \ud83d character"},
        {"answer": 1 << 80},
        {"answer": Unspeakable()},
        {"answer": {(1, 2): "a tuple for a key"}},
    ],
)
def test_nothing_a_task_returns_ends_a_worker(tmp_path: Path, info: dict[str, object]) -> None:
    """Texts that no encoding has, numbers beyond 64 bits, objects without words, scores of other types: the rollout is
    recorded with what can be."""
    recorder = RolloutRecorder(RecordConfig(), tmp_path / "rollouts" / "0", print)
    odd = rollout()
    odd.info.clear()
    odd.info.update(info)
    odd.main.scores.update({"judge": np.float32(0.5), "none": None})  # type: ignore[dict-item]
    recorder.train(0, 0, "0/0", 1, ("q \udcff", "gold"), odd, "")
    recorder.train(0, 0, "0/0", 2, ("q", "gold"), None, "why \udcff")
    found = Recording([tmp_path]).rollouts
    body = found["0/0/1"].body()
    assert found["0/0/1"].head.question == "q ?" and len(body.trajectories) == 3
    scores = body.trajectories[0].scores
    assert scores["judge"] == 0.5 and math.isnan(scores["none"])
    assert found["0/0/2"].body().failure == "why ?"


def test_two_processes_in_one_folder_do_not_collide(tmp_path: Path) -> None:
    """A predecessor that has not ended yet still writes: each has segments of its own."""
    first, second = SegmentWriter(tmp_path, 1 << 20), SegmentWriter(tmp_path, 1 << 20)
    first.append(b"one", b"1")
    second.append(b"two", b"2")
    first.append(b"three", b"3")
    assert sorted(f.head for f in SegmentReader(tmp_path).fresh()) == [b"one", b"three", b"two"]


def step_frame(writer: SegmentWriter, step: int, at: float) -> None:
    writer.append(msgspec.msgpack.encode(StepHead("main", step, at)), b"")


def test_steps_that_a_trainer_went_back_behind_are_left_out(tmp_path: Path) -> None:
    """Steps 0 to 5, then from 3 again: of the first life only what is before 3 counts."""
    writer = SegmentWriter(tmp_path / "agents" / "main" / "record", 1 << 20)
    for at, step in enumerate([0, 1, 2, 3, 4, 5]):
        step_frame(writer, step, float(at))
    recording = Recording([tmp_path])
    assert sorted(s for _, s in recording.steps) == [0, 1, 2, 3, 4, 5]
    step_frame(writer, 3, 10.0)
    recording.refresh()
    assert sorted(s for _, s in recording.steps) == [0, 1, 2, 3]
    step_frame(writer, 4, 11.0)
    recording.refresh()
    ages = {s: found.head.at for (_, s), found in Recording([tmp_path]).steps.items()}
    assert ages == {0: 0.0, 1: 1.0, 2: 2.0, 3: 10.0, 4: 11.0}


def test_a_rollout_of_two_workers_counts_the_last_time(tmp_path: Path) -> None:
    """Resumed with fewer workers, a group may be played by another one: the later recording counts."""
    for worker, answer in ((1, "early"), (0, "late")):
        recorder = RolloutRecorder(RecordConfig(), tmp_path / "rollouts" / str(worker), print)
        again = rollout()
        again.info["answer"] = answer
        recorder.train(0, 0, "0/0", 1, ("q", "a"), again, "")
    assert Recording([tmp_path]).rollouts["0/0/1"].head.answer == "late"


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


def test_a_recorded_run_is_in_its_trace(recorded: Path, tmp_path: Path) -> None:
    """Whatever the record of a real run has, with rollouts that failed and were played again, is there once."""
    run = tmp_path / "run"
    shutil.copytree(recorded, run)
    done = check_trace(run)
    assert done.counts["step"] == done.counts["claim"] == 3 * 12 and done.counts["publish"] == 3 * 13
    assert done.arrows.backwards == 0 and done.arrows.counts["rollout -> read"] > 500
    assert not done.notes
