"""Checkpoints: complete or absent, exact, and a damaged one is named."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mgrpo.config import dump_config, load_config
from mgrpo.errors import CheckpointError, CorruptionError
from mgrpo.model.policy import Policy
from mgrpo.pipeline.feed import Feed
from mgrpo.pipeline.step_clock import StepClock
from mgrpo.pipeline.trainer_loop import TrainerLoop
from mgrpo.run.folder import RunFolder
from mgrpo.trainers.base import Checkpoint
from mgrpo.trainers.torch import checkpoint
from mgrpo.trainers.torch.checkpoint import (
    CheckpointWriter,
    latest_checkpoint,
    note_cursors,
    prepare_folder,
    restore_checkpoint,
    save_checkpoint,
    snapshot,
)
from mgrpo.trajectory_log.format import Meta
from mgrpo.trajectory_log.log import TrajectoryLog
from tests.models import tiny_policy
from tests.runs import RELAY, command, leftovers, resume, started, steps_of, summary


def trained(seed: int, steps: int) -> tuple[Policy, torch.optim.Optimizer]:
    """A policy after some optimizer steps, so that the optimizer has a state worth saving."""
    policy = tiny_policy("shift", seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, foreach=True)
    for step in range(steps):
        advance(policy, optimizer, step)
    return policy, optimizer


def advance(policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = torch.arange(10)[None] + step
    optimizer.zero_grad()
    (policy.hidden(ids) @ policy.head_weight.T).logsumexp(-1).sum().backward()
    optimizer.step()


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Steps after a restore equal those of the undisturbed trainer: weights and optimizer state are all there."""
    policy, optimizer = trained(0, 3)
    save_checkpoint(tmp_path, 3, policy, optimizer, keep=2)
    other, other_optimizer = trained(1, 0)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 3
    restore_checkpoint(found, other, other_optimizer)
    for step in (3, 4):
        advance(policy, optimizer, step)
        advance(other, other_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(other), strict=True))


def test_only_the_last_are_kept_and_leftovers_do_not_count(tmp_path: Path) -> None:
    """A partial folder of a crash is no checkpoint; old ones go."""
    policy, optimizer = trained(0, 1)
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, policy, optimizer, keep=2)
    (tmp_path / ".step-00000009.partial").mkdir()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 3


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    """A flipped byte, a cut file or a missing one: the error names the file."""
    policy, optimizer = trained(0, 1)
    path = save_checkpoint(tmp_path, 1, policy, optimizer, keep=2).path / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)
    with pytest.raises(
        CorruptionError, match=name.replace(".", r"\.") if damage != "flip" else "step-00000001"
    ):
        latest_checkpoint(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def test_the_newest_intact_one_is_gone_back_to(tmp_path: Path) -> None:
    """Behind a damaged checkpoint lies the one before it, and what is wrong is said; damaged are all: refused."""
    policy, optimizer = trained(0, 1)
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, policy, optimizer, keep=3)
    flip(tmp_path / "step-00000006" / "__0_0.distcp")
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 2 and len(found.passed_over) == 2
    assert "step-00000006" in found.passed_over[0] and "step-00000004" in found.passed_over[1]
    flip(tmp_path / "step-00000002" / "__0_0.distcp")
    with pytest.raises(CorruptionError, match="step-00000006"):
        latest_checkpoint(tmp_path)


def test_going_back_leaves_nothing_of_the_history_that_was_left(tmp_path: Path) -> None:
    """Back at step 2, a checkpoint of step 3 is written: that of step 4, whole or not, is of no use any more; step 3
    written again replaces what is there."""
    policy, optimizer = trained(0, 1)
    for step in (2, 4):
        save_checkpoint(tmp_path, step, policy, optimizer, keep=2)
    flip(tmp_path / "step-00000004" / "__0_0.distcp")
    for _ in range(2):
        advance(policy, optimizer, 0)
        save_checkpoint(tmp_path, 3, policy, optimizer, keep=2)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 3 and not found.passed_over
    other, other_optimizer = trained(1, 0)
    restore_checkpoint(found, other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(other), strict=True))


def test_a_half_deleted_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while an old one is deleted: it has lost its name first, and its rest goes with the next."""
    policy, optimizer = trained(0, 1)
    save_checkpoint(tmp_path, 1, policy, optimizer, keep=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    save_checkpoint(tmp_path, 2, policy, optimizer, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000002"]
    save_checkpoint(tmp_path, 3, policy, optimizer, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_names_are_durable_with_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's folder is synced before it gets its name, and the folder of that name after it."""
    policy, optimizer = trained(0, 1)
    seen: list[tuple[str, bool]] = []
    root = tmp_path / "checkpoints"
    fsync = os.fsync

    def watched(file: int) -> None:
        seen.append((str(Path(f"/proc/self/fd/{file}").readlink()), (root / "step-00000001").exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    save_checkpoint(root, 1, policy, optimizer, keep=1)
    for wanted in ((str(tmp_path), False), (str(root / ".step-00000001.partial"), False), (str(root), True)):
        assert wanted in seen, seen


def test_tokens_are_kept_for_the_oldest_checkpoint(tmp_path: Path) -> None:
    """Two checkpoints are kept: the trajectory log is cut to what the older one would need, whichever of them is
    written, read again after a restart, or gone; without its note nothing is deleted."""
    policy, optimizer = trained(0, 1)
    first = save_checkpoint(tmp_path, 2, policy, optimizer, keep=2)
    assert note_cursors(first, {"main": 8, "left": 7}) == {"main": 8, "left": 7}
    second = save_checkpoint(tmp_path, 4, policy, optimizer, keep=2)
    for _ in range(2):
        assert note_cursors(second, {"main": 16, "left": 15}) == {"main": 8, "left": 7}
    assert latest_checkpoint(tmp_path) == second  # the note is no part of what the manifest sums up
    (first.path / "cursors.json").write_text("torn {")
    assert note_cursors(second, {"main": 16, "left": 15}) == {"main": 0, "left": 0}
    third = save_checkpoint(tmp_path, 6, policy, optimizer, keep=2)
    assert note_cursors(third, {"main": 24, "left": 23}) == {"main": 16, "left": 15}


class Committed:
    """A role stream's store: every group of the steps up to a commit is committed, two groups a step."""

    def commit(self, *, step: int) -> int:
        return 2 * (step + 1)


def test_a_trainer_cuts_its_trajectory_log_for_the_oldest_checkpoint(tmp_path: Path) -> None:
    """What an older kept checkpoint would train on again is still in the trajectory log, also after a restart."""
    policy, optimizer = trained(0, 1)
    trajectory_log = TrajectoryLog(tmp_path / "trajectories", role="main", digest="d", segment_bytes=1)
    for index in range(20):
        trajectory_log.append(Meta(f"{index}", 0, "main", 0, 0, index, {}, 1), bytes(13))
    kept: list[int] = []
    recorder = SimpleNamespace(keep=lambda c: kept.append(c.step))
    feed, trainer = object.__new__(Feed), object.__new__(TrainerLoop)
    trainer._trainer = SimpleNamespace(note_cursors=note_cursors)  # type: ignore[assignment]
    trainer._feed, feed._begun, feed._clock, feed.step = feed, None, StepClock("main"), 0
    feed._reporter = SimpleNamespace(flush=lambda: None)  # type: ignore[assignment]
    feed._streams = [
        SimpleNamespace(role="main", trajectory_log=trajectory_log, store=Committed(), recorder=recorder)
    ]  # type: ignore[list-item]

    def left() -> int:
        return min(index for index in range(20) if (f"{index}", 0, 0, 0) in trajectory_log._index)

    with trajectory_log:
        for step, first in ((2, 4), (4, 4), (4, 4), (6, 8)):
            trainer._commit(save_checkpoint(tmp_path / "c", step, policy, optimizer, keep=2))
            assert left() == first and feed.saved_step == step
    assert kept == [2, 4, 4, 6]


def test_steps_go_on_while_bytes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the bytes are on disk there is no checkpoint; then there is one, of the state as it was at its step."""
    policy, optimizer = trained(0, 3)
    expected = weights(policy)
    go_on = threading.Event()
    write = checkpoint.write_atomic

    def slow(path: Path, data: str) -> None:
        assert go_on.wait(60)
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomic", slow)
    writer = CheckpointWriter(tmp_path, keep=1)
    prepare_folder(tmp_path, 3)
    writer.begin(3, snapshot(policy, optimizer))
    try:
        for step in (3, 4):
            advance(policy, optimizer, step)
        assert writer.saved(wait=False) is None and latest_checkpoint(tmp_path) is None
    finally:
        go_on.set()
        saved = writer.saved(wait=True)
    assert saved == latest_checkpoint(tmp_path) == Checkpoint(tmp_path / "step-00000003", 3)
    assert writer.saved(wait=True) is None
    other, other_optimizer = trained(1, 0)
    restore_checkpoint(saved, other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(other), strict=True))
    for step in (3, 4):
        advance(other, other_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(other), strict=True))


def test_another_policy_is_refused(tmp_path: Path) -> None:
    """Weights of another model, or of another size: the error names the first tensor, and nothing is loaded."""
    policy, optimizer = trained(0, 1)
    saved = save_checkpoint(tmp_path, 1, policy, optimizer, keep=1)
    other = tiny_policy("llama")
    with pytest.raises(CorruptionError, match=r"lacks model\.lm_head\.weight"):
        restore_checkpoint(saved, other, torch.optim.AdamW(other.parameters()))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, of so many bytes; the test is skipped where none may be mounted."""
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("no small file system: mounting one takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def more_room(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_a_full_disk_costs_no_checkpoint(tmp_path: Path) -> None:
    """The error names the checkpoint and the reason; the one before is whole, nothing partial stays, and with room
    again the same step is saved."""
    policy, optimizer = trained(0, 2)
    with small_disk(tmp_path / "disk", "640k") as root:
        first = save_checkpoint(root, 1, policy, optimizer, keep=5)
        with pytest.raises(CheckpointError, match=r"step-00000002: .*No space left on device"):
            save_checkpoint(root, 2, policy, optimizer, keep=5)
        assert latest_checkpoint(root) == first
        assert [p.name for p in root.iterdir()] == ["step-00000001"]
        restore_checkpoint(first, *trained(1, 0))
        more_room(root, "2m")
        assert save_checkpoint(root, 2, policy, optimizer, keep=5) == latest_checkpoint(root)


def test_a_run_on_a_full_disk_says_so_and_can_be_resumed(tmp_path: Path) -> None:
    """No room for the second checkpoint: the run ends with a reason that names it, what the store was told is durable
    is, and with room again the run goes on from the first to its end."""
    out = tmp_path / "run"
    sets = [
        "agents.left.shares=main", "agents.right.shares=main", "agents.right.loss.type=grpo",
        "trainer.steps=4", "trainer.checkpoint_every=1", "record.enabled=false",
    ]  # fmt: skip
    out.mkdir()
    dump_config(load_config(RELAY, sets), RunFolder(out).config)
    with small_disk(out / "agents" / "main" / "checkpoints", "640k") as root:
        with started(command("train", "--resume", str(out))) as process:
            output, _ = process.communicate(timeout=800)
        assert process.returncode == 2, output
        said = output.splitlines()[-1]
        assert "step-00000002" in said and "No space left on device" in said, output
        assert not summary(out)["finished"] and leftovers(out) == []
        found = latest_checkpoint(root)
        assert found is not None and found.step == 1
        with sqlite3.connect(RunFolder(out).database) as store:
            (committed,) = store.execute(
                "SELECT count(*) FROM deliveries WHERE role = 'main' AND state = 'committed'"
            ).fetchone()
        store.close()
        assert committed == 4  # the groups of one step
        more_room(root, "4m")
        output = resume(out)
        assert "main: resumed at step 1" in output
    assert summary(out)["finished"] and steps_of(out) == 4
    assert leftovers(out) == []
