"""The trainer's side of the record: the numbers each step trained with, and checkpoints to replay losses from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt

from mgrpo.config.run import RecordConfig
from mgrpo.record.schema import ROW, MiniBatchRecord, StepBody, StepHead
from mgrpo.record.segments import SegmentWriter
from mgrpo.trainer.batch import Member, StepBatch
from mgrpo.trainer.checkpoint import Checkpoint
from mgrpo.trainer.step import MiniBatch

_TENSORS = ("ids", "loss_mask", "rollout_logprobs", "lengths", "advantages", "weights")


class StepRecorder:
    """Writes the steps of one role to a folder; does nothing when recording is switched off."""

    def __init__(self, config: RecordConfig, folder: Path, role: str) -> None:
        self._role, self._checkpoints = role, folder / "checkpoints"
        self._enabled, self._bound = config.enabled, int(config.checkpoints_mb * 1e6)
        self._writer = SegmentWriter(folder, int(config.max_mb * 1e6)) if config.enabled else None

    def step(self, batch: StepBatch, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            head, body = StepHead(self._role, batch.step), step_body(batch, metrics)
            self._writer.append(msgspec.msgpack.encode(head), msgspec.msgpack.encode(body))

    def keep(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint's files by hard links, the oldest ones only as long as all fit."""
        if not self._enabled or not self._bound:
            return
        folder = self._checkpoints / checkpoint.path.name
        shutil.rmtree(folder, ignore_errors=True)  # a step that is trained again after a rollback
        folder.mkdir(parents=True)
        for file in checkpoint.path.iterdir():
            os.link(file, folder / file.name)
        kept = sorted(self._checkpoints.iterdir())
        sizes = [sum(f.stat().st_size for f in path.iterdir()) for path in kept]
        while kept and sum(sizes) > self._bound:
            shutil.rmtree(kept.pop(0))
            sizes.pop(0)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def step_body(batch: StepBatch, metrics: Mapping[str, float]) -> StepBody:
    """The record of a step: the same function writes it and, in a replay, rebuilds it."""
    names = {group.query: number for number, group in enumerate(batch.groups)}
    rows = np.zeros(len(batch.members), ROW)
    for number, member in enumerate(batch.members):
        rows[number] = _row(member)
    mean, std = [0.0] * len(batch.groups), [0.0] * len(batch.groups)
    for number, plan in enumerate(batch.plans):
        kept = plan.rows
        for column in ("advantage", "multiplicity", "weight"):
            rows[column][kept.traj_id] = getattr(kept, column)
        for (query, _), m, s in zip(plan.groups, plan.group_mean, plan.group_std, strict=True):
            mean[names[query]], std[names[query]] = float(m), float(s)
            rows["minibatch"][rows["group"] == names[query]] = number
    return StepBody(
        k=batch.groups[0].k if batch.groups else 0,
        queries=[g.query for g in batch.groups],
        indices=[g.index for g in batch.groups],
        failed=[(n, r.rollout) for n, g in enumerate(batch.groups) for r in g.rollouts if r.status != "ok"],
        mean=mean,
        std=std,
        rows=rows.tobytes(),
        scores=[member.invocation.scores for member in batch.members],
        minibatches=[_minibatch(m) for m in batch.minibatches],
        metrics={name: float(value) for name, value in metrics.items()},
    )


def _row(member: Member) -> tuple[float, ...]:
    t = member.trajectory
    return (
        member.group, member.invocation.rollout, member.invocation.invocation, -1, member.rollout.correct,
        member.reward, 0.0, 0, 0.0, len(t), int(np.count_nonzero(t.loss_mask)), member.invocation.version_min,
        _crc(t.tokens), _crc(t.loss_mask), _crc(t.logprobs),
    )  # fmt: skip


def _minibatch(batch: MiniBatch) -> MiniBatchRecord:
    crc = dict.fromkeys(_TENSORS, 0)
    for micro in batch.micro:
        for name in _TENSORS:
            crc[name] = int(google_crc32c.extend(crc[name], getattr(micro, name).numpy().tobytes()))
    return MiniBatchRecord(batch.denominator, crc)


def _crc(array: npt.NDArray[np.generic]) -> int:
    return int(google_crc32c.value(array.tobytes()))
