"""A run with many recorded rollouts, made of a short one: its record is written again and again under new names."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from mgrpo.record.reader import Recording
from mgrpo.record.schema import StepBody
from mgrpo.record.segments import SegmentWriter

BOUND = 1 << 30  # bytes a folder: nothing is rotated away


def multiply(run: Path, out: Path, rollouts: int) -> int:
    """Copy `run` to `out` with its training repeated until it holds at least `rollouts` rollouts of training, every
    step and every rollout under a number of its own; returns how many."""
    shutil.copytree(run, out)
    recording = Recording([run])
    train = [r for r in recording.rollouts.values() if r.head.split == "train"]
    steps = 1 + max(r.head.step for r in train)
    rounds = -(-rollouts // len(train))
    writers = {p: SegmentWriter(p, BOUND) for p in {out / "rollouts" / "0", *out.glob("agents/*/record")}}
    for number in range(1, rounds):
        for rollout in train:
            head = msgspec.structs.replace(
                rollout.head,
                query=renamed(rollout.head.query, number, steps),
                id=renamed(rollout.head.id, number, steps),
                step=rollout.head.step + number * steps,
            )
            writers[out / "rollouts" / "0"].append(msgspec.msgpack.encode(head), rollout.frame.body())
        for (role, _), step in recording.steps.items():
            body: StepBody = step.body()
            body.queries = [renamed(q, number, steps) for q in body.queries]
            moved = msgspec.structs.replace(step.head, step=step.head.step + number * steps)
            writers[out / "agents" / role / "record"].append(
                msgspec.msgpack.encode(moved), msgspec.msgpack.encode(body)
            )
    for writer in writers.values():
        writer.close()
    return rounds * len(train)


def renamed(name: str, number: int, steps: int) -> str:
    """The name of a query or a rollout (<step>/<...>) of a later round."""
    first, _, rest = name.partition("/")
    return f"{int(first) + number * steps}/{rest}"
