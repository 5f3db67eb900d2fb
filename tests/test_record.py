"""The record's files: bounded, readable while they grow, and never wrong where they are torn or damaged."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from mgrpo.cli.parts import RunFolder
from mgrpo.cli.viewdata import RunView
from mgrpo.config import dump_config, load_config
from mgrpo.config.run import RecordConfig
from mgrpo.errors import CorruptionError
from mgrpo.record import segments
from mgrpo.record.notes import Notes, read_notes
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.schema import StepHead
from mgrpo.record.segments import SEGMENTS, SegmentReader, SegmentWriter
from mgrpo.record.writer import RecordWriter
from mgrpo.trainer import record as trainer_record
from mgrpo.trainer.checkpoint import Checkpoint
from mgrpo.trainer.record import StepRecorder
from mgrpo.types import Rollout, Trajectory
from tests.runs import RELAY, ROOT, command, finish, leftovers, steps_of, summary
from tests.test_checkpoint import small_disk


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


LIMITED = """
import resource, sys
from pathlib import Path
from mgrpo.config.run import RecordConfig
from mgrpo.record.rollouts import RolloutRecorder
from tests.test_record import rollout
said = []
recorder = RolloutRecorder(RecordConfig(), Path(sys.argv[1]), said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for step in range(100):
    recorder.train(step, step, f"{step}/{step}", 0, ("q", "a"), rollout(), "")
    recorder.tokenizer("main", {"tokenizer.json": b"x" * 30_000})
recorder.close()
print(len(said), *said)
"""


def test_a_full_disk_ends_the_recording_only(tmp_path: Path) -> None:
    """A process whose files may not grow: it goes on, says once what happened, and the record says it too. The process
    that comes after it records again."""
    folder = tmp_path / "rollouts" / "0"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 1 and said[0].startswith(f"1 {folder}: recording stopped at "), said
    assert "File too large" in said[0]
    recording = Recording([tmp_path])
    assert recording.notes() == [said[0][2:]]
    assert list(recording.rollouts) == ["0/0/0"] and recording.rollouts["0/0/0"].body().trajectories
    later = RolloutRecorder(RecordConfig(), folder, print)
    later.train(1, 1, "1/1", 0, ("q", "a"), rollout(), "")
    later.close()
    assert list(Recording([tmp_path]).rollouts) == ["0/0/0", "1/1/0"]


def test_a_frame_that_did_not_fit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk becomes full within a frame: it is as if it had not been, and no later frame is tried."""
    said: list[str] = []
    writer = RecordWriter(tmp_path / "rollouts" / "0", 1 << 20, said.append)
    writer.append(0, b"one", b"1" * 100)
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) <= 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:60])

    monkeypatch.setattr(segments.os, "write", full)
    writer.append(7, b"two", b"2" * 100)
    monkeypatch.undo()
    writer.append(8, b"three", b"3")
    assert not writer.active and said == [
        f"{writer.folder}: recording stopped at step 7: No space left on device"
    ]
    assert [frame.head for frame in SegmentReader(writer.folder).fresh()] == [b"one"]
    assert read_notes(writer.folder) == ["recording stopped at step 7: No space left on device"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """Nothing can be recorded, not even why: it is reported, and every call does nothing."""
    (tmp_path / "rollouts").write_text("a file")
    said: list[str] = []
    recorder = RolloutRecorder(RecordConfig(), tmp_path / "rollouts" / "0", said.append)
    recorder.tokenizer("main", {"tokenizer.json": b"{}"})
    recorder.train(0, 0, "0/0", 0, ("q", "a"), rollout(), "")
    recorder.close()
    assert len(said) == 1 and "recording stopped at the start: Not a directory" in said[0]


def test_notes_stay_within_their_room(tmp_path: Path) -> None:
    """However often a process is started on a full disk: the latest notes are there, the file does not grow."""
    for number in range(300):
        Notes(tmp_path).add(f"recording stopped at step {number}: Nö space\nleft on device")
    assert (tmp_path / "notes.txt").stat().st_size == 4096
    notes = read_notes(tmp_path)
    assert notes[-1] == "recording stopped at step 299: Nö space left on device" and len(notes) > 50


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


# -- kept checkpoints ----------------------------------------------------------------------------------------------


def written(root: Path, step: int, size: int = 1000) -> Checkpoint:
    """Something like a checkpoint."""
    path = root / f"step-{step:08d}"
    path.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (path / name).write_bytes(bytes(size))
    return Checkpoint(path, step)


def step_recorder(tmp_path: Path, said: list[str], **settings: float) -> StepRecorder:
    return StepRecorder(RecordConfig(**settings), tmp_path / "record", "main", said.append)  # type: ignore[arg-type]


def kept(tmp_path: Path) -> dict[str, list[str]]:
    folder = tmp_path / "record" / "checkpoints"
    return {p.name: sorted(f.name for f in p.iterdir()) for p in sorted(folder.iterdir())}


def test_a_kept_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    """Killed in the middle, under its own name or before: the next one that is kept finds nothing in its way."""
    said: list[str] = []
    recorder = step_recorder(tmp_path, said)
    torn = tmp_path / "record" / "checkpoints" / ".step-00000002"
    torn.mkdir(parents=True)
    (torn / "a").write_bytes(b"x")
    recorder.keep(written(tmp_path / "one", 2))
    recorder.keep(written(tmp_path / "two", 2))
    recorder.keep(written(tmp_path / "two", 4))
    assert kept(tmp_path) == {f"step-0000000{n}": ["a", "b", "c"] for n in (2, 4)} and said == []
    recorder.begin(3)  # the trainer has gone back behind step 4
    assert list(kept(tmp_path)) == ["step-00000002"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_without_links_checkpoints_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The record lies on another file system, or on one without hard links: said once, in the record too."""
    said: list[str] = []
    recorder = step_recorder(tmp_path, said)

    def refused(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(trainer_record.os, "link", refused)
    for step in (2, 4):
        recorder.keep(written(tmp_path / "checkpoints", step))
    assert kept(tmp_path) == {f"step-0000000{n}": ["a", "b", "c"] for n in (2, 4)}
    assert len(said) == 1 and os.strerror(code) in said[0]
    assert read_notes(tmp_path / "record") == [said[0].partition(": ")[2]]


def test_no_room_for_a_kept_checkpoint_ends_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither links nor room for copies: recording stops, nothing partial stays, nothing is raised."""
    said: list[str] = []
    recorder = step_recorder(tmp_path, said)
    recorder.keep(written(tmp_path / "checkpoints", 2))

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer_record.os, "link", full)
    monkeypatch.setattr(trainer_record.shutil, "copyfile", full)
    for step in (4, 6):
        recorder.keep(written(tmp_path / "checkpoints", step))
    assert list(kept(tmp_path)) == ["step-00000002"]
    assert said[-1].endswith("recording stopped at the checkpoint of step 4: No space left on device")


def test_the_bound_of_kept_checkpoints_holds(tmp_path: Path) -> None:
    """The oldest go first."""
    recorder = step_recorder(tmp_path, [], checkpoints_mb=0.0065)
    for step in (2, 4, 6):
        recorder.keep(written(tmp_path / "checkpoints", step))
    assert list(kept(tmp_path)) == ["step-00000004", "step-00000006"]


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


def test_a_run_goes_on_when_nothing_can_be_recorded(tmp_path: Path) -> None:
    """The disk of the rollouts' record becomes full and one trainer's record cannot even be begun: the run ends well,
    says so, and the page and the replay know what is missing."""
    out = tmp_path / "run"
    out.mkdir()
    sets = [
        "trainer.steps=3",
        "trainer.checkpoint_every=1",
        "eval.gate=0",
        "eval.heldout=1",
        "eval.validation=1",
    ]
    dump_config(load_config(RELAY, sets), RunFolder(out).config)
    blocked = out / "agents" / "left" / "record"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder would be")
    with small_disk(out / "rollouts", "32k") as disk:
        output = finish(command("train", "--resume", str(out)), 240)
        assert summary(out)["finished"] and steps_of(out) == 3
        assert output.count("recording stopped") == 2, output
        assert f"{blocked}: recording stopped at the start: File exists" in output
        notes = RunView(out).overview()["notes"]
        assert len(notes) == 1 and notes[0].startswith(f"{disk / '0'}: recording stopped at ")
        assert notes[0].endswith("No space left on device") and notes[0] in output
        recording = Recording([out])
        assert {role for role, _ in recording.steps} == {"main", "right"} and recording.rollouts
    assert leftovers(out) == []
