"""The trainer's side of the record: the numbers each step trained with, and checkpoints to replay losses from."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt

from mgrpo.batcher.plan import Plan, Rows
from mgrpo.config.record import RecordConfig
from mgrpo.pipeline.batch import StepBatch
from mgrpo.pipeline.batch_metrics import Member
from mgrpo.pipeline.step_perf import entering_tokens
from mgrpo.record.schema import ROW, MiniBatchRecord, StepBody, StepHead, StepSettings
from mgrpo.record.writer import RecordWriter, Report
from mgrpo.trainers.base import Checkpoint
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.checkpoint import step_folders, step_of

_TENSORS = ("ids", "loss_mask", "rollout_logprobs", "lengths", "advantages", "weights")


class StepRecorder:
    """Writes the steps of one role to a folder; does nothing when recording is switched off. Never raises OSError."""

    def __init__(self, config: RecordConfig, folder: Path, role: str, report: Report) -> None:
        """report: takes one line when recording has to stop."""
        self._role, self._checkpoints = role, folder / "checkpoints"
        self._bound = int(config.checkpoints_mb * 1e6)
        self._writer = RecordWriter(folder, int(config.max_mb * 1e6), report) if config.enabled else None
        self._copies = False

    def step(self, batch: StepBatch, metrics: Mapping[str, float], settings: StepSettings) -> None:
        """Record a step that was taken with `settings`."""
        if self._writer is not None and self._writer.active:
            head, body = StepHead(self._role, batch.step, time.time()), step_body(batch, metrics, settings)
            self._writer.append(batch.step, msgspec.msgpack.encode(head), msgspec.msgpack.encode(body))

    def begin(self, step: int) -> None:
        """The trainer starts at `step`: kept checkpoints beyond it are of a history that was left, and go."""
        if self._writer is None or not self._writer.active:
            return
        with self._writer.guard(f"step {step}"):
            for path in self._kept():
                if step_of(path) > step:
                    shutil.rmtree(path)

    def keep(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint's files by hard links, or by copies where the disk has no links; the oldest ones only as
        long as all fit. A folder gets its name when it is complete."""
        if self._writer is None or not self._writer.active or not self._bound:
            return
        with self._writer.guard(f"the checkpoint of step {checkpoint.step}"):
            partial = self._checkpoints / f".{checkpoint.path.name}"
            try:
                self._gather(checkpoint, partial)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            self._make_room()

    def _gather(self, checkpoint: Checkpoint, partial: Path) -> None:
        for left in self._checkpoints.glob(".step-*"):  # of a process that was killed here
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        for file in checkpoint.path.iterdir():
            self._take(file, partial / file.name)
        folder = self._checkpoints / checkpoint.path.name
        if folder.exists():  # a step that is trained again after a rollback
            shutil.rmtree(folder)
        partial.rename(folder)

    def _take(self, file: Path, target: Path) -> None:
        if not self._copies:
            try:
                os.link(file, target)
                return
            except OSError as error:  # another file system, one without links, or with too many of this file
                assert self._writer is not None
                self._copies = True
                self._writer.note(f"checkpoints are copied: a hard link was refused ({error.strerror})")
        shutil.copyfile(file, target)

    def _make_room(self) -> None:
        kept = self._kept()
        sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in kept]
        while kept and sum(sizes) > self._bound:
            shutil.rmtree(kept.pop(0))
            sizes.pop(0)

    def _kept(self) -> list[Path]:
        """Oldest first."""
        return step_folders(self._checkpoints)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def step_body(batch: StepBatch, metrics: Mapping[str, float], settings: StepSettings) -> StepBody:
    """The record of a step: the same function writes it and, in a replay, rebuilds it."""
    names = {group.query: number for number, group in enumerate(batch.groups)}
    rows = np.zeros(len(batch.members), ROW)
    for number, member in enumerate(batch.members):
        rows[number] = _row(member)
    for number, plan in enumerate(batch.plans):
        for column, values in _of_trajectories(plan.rows).items():
            rows[column][plan.rows.traj_id[plan.rows.first()]] = values
        for query in plan.queries:
            rows["minibatch"][rows["group"] == names[query]] = number
    return StepBody(
        settings=settings,
        k=batch.groups[0].k if batch.groups else 0,
        queries=[g.query for g in batch.groups],
        indices=[g.index for g in batch.groups],
        failed=[(n, r.rollout) for n, g in enumerate(batch.groups) for r in g.rollouts if r.status != "ok"],
        mean=list(batch.mean),
        std=list(batch.std),
        rows=rows.tobytes(),
        scores=[member.invocation.scores for member in batch.members],
        minibatches=[_minibatch(*both) for both in zip(batch.minibatches, batch.plans, strict=True)],
        metrics={name: float(value) for name, value in metrics.items()},
        shared=_shared(batch).tobytes() if settings.share_prefixes else b"",
    )


def _shared(batch: StepBatch) -> npt.NDArray[np.int32]:
    """Of each member's rows the leading tokens that another row has computed, those of all its segments together."""
    shared = np.zeros(len(batch.members), "<i4")
    for plan in batch.plans:
        np.add.at(shared, plan.rows.traj_id, plan.row_shared)
    return shared


def _of_trajectories(rows: Rows) -> dict[str, npt.NDArray[np.generic]]:
    """What the kept trajectories were trained with; an advantage is the mean over the sampled tokens of all rows."""
    first = rows.first()
    if not len(first):
        return {}
    active = rows.active.astype(np.float64)
    advantage = np.add.reduceat(rows.advantage * active, first) / np.add.reduceat(active, first)
    weight = np.add.reduceat(rows.weight, first)
    return {"advantage": advantage, "multiplicity": rows.multiplicity[first], "weight": weight}


def _row(member: Member) -> tuple[float, ...]:
    t = member.trajectory
    return (
        member.group, member.invocation.rollout, member.invocation.invocation, -1, member.rollout.correct,
        member.reward, 0.0, 0, 0.0, len(t), int(np.count_nonzero(t.loss_mask)), member.invocation.version_min,
        _crc(t.tokens), _crc(t.loss_mask), _crc(t.logprobs),
    )  # fmt: skip


def _minibatch(batch: MiniBatch, plan: Plan) -> MiniBatchRecord:
    optional = ("token_advantages", "experts")
    names = [*_TENSORS, *(n for n in optional if any(getattr(m, n) is not None for m in batch.micro))]
    crc = dict.fromkeys(names, 0)
    for micro in batch.micro:
        for name in names:
            if (tensor := getattr(micro, name)) is not None:  # experts of one without any
                crc[name] = int(google_crc32c.extend(crc[name], tensor.numpy().tobytes()))
    entering = sum(map(entering_tokens, batch.micro))
    return MiniBatchRecord(batch.denominator, crc, entering - plan.shared_tokens, plan.shared_tokens)


def _crc(array: npt.NDArray[np.generic]) -> int:
    return int(google_crc32c.value(array.tobytes()))
