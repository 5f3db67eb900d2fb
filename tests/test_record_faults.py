"""The record never ends a run: not where the disk is full, nor where the folder cannot be made or has no links."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgrpo.config import dump_config, load_config
from mgrpo.config.record import RecordConfig
from mgrpo.pipeline import step_record as trainer_record
from mgrpo.pipeline.step_record import StepRecorder
from mgrpo.record import segments
from mgrpo.record.notes import Notes, read_notes
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.segments import SegmentReader
from mgrpo.record.writer import RecordWriter
from mgrpo.run.folder import RunFolder
from mgrpo.trainers.base import Checkpoint
from mgrpo.view.data import RunView
from tests.runs import RELAY, ROOT, command, finish, leftovers, steps_of, summary
from tests.test_checkpoint import small_disk
from tests.test_record import rollout

LIMITED = """
import resource, sys
from pathlib import Path
from mgrpo.config.record import RecordConfig
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
        timeout=600,
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


def test_a_run_goes_on_when_nothing_can_be_recorded(tmp_path: Path) -> None:
    """The disk of the rollouts' record becomes full and one trainer's record cannot even be begun: the run ends well,
    says so, and the page and the replay know what is missing."""
    out = tmp_path / "run"
    out.mkdir()
    sets = [
        "trainer.steps=3",
        "trainer.checkpoint_every=1",
        "eval.start_validation=0",
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
        said = {folder: output.count(f"{folder}: recording stopped") for folder in (blocked, disk / "0")}
        said |= {folder / "spans": output.count(f"{folder / 'spans'}: recording stopped") for folder in said}
        # A worker's last spans may fit into what is left of a page, and then are there.
        assert said.pop(disk / "0" / "spans") <= 1 and set(said.values()) == {1}, output
        assert f"{blocked}: recording stopped at the start: File exists" in output
        notes = [note for note in RunView(out).overview()["notes"] if f"{disk / '0' / 'spans'}: " not in note]
        assert len(notes) == 1 and notes[0].startswith(f"{disk / '0'}: recording stopped at ")
        assert notes[0].endswith("No space left on device") and notes[0] in output
        recording = Recording([out])
        assert {role for role, _ in recording.steps} == {"main", "right"} and recording.rollouts
    assert leftovers(out) == []
