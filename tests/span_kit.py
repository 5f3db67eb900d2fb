"""What the spans of a whole, undisturbed run must be: everything that the record holds, once, nested, none negative."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from mgrpo.pipeline.step_clock import METRICS
from mgrpo.record.reader import Recording
from mgrpo.record.schema import TrajectoryRecord
from mgrpo.record.span_reader import SpanReader
from mgrpo.record.spans import Span
from tests.runs import records


def check_spans(out: Path, roles: tuple[str, ...], steps: int) -> dict[str, list[Span]]:
    """Check the spans of a run of so many steps, in which no process was started twice; returns them by process."""
    reader = SpanReader([out])
    found = reader.spans()
    assert not reader.damaged
    workers = [process for process in found if process.startswith("rollout-")]
    assert set(found) - set(workers) == {f"trainer {role}" for role in roles} and workers
    assert all(span.start <= span.end for spans in found.values() for span in spans)
    labels = {role: _check_trainer(found[f"trainer {role}"], steps) for role in roles}
    for worker in workers:
        _check_weights(found[worker], labels)
    _check_rollouts([span for worker in workers for span in found[worker]], Recording([out]))
    check_times(out, roles)
    return found


def check_times(out: Path, roles: tuple[str, ...]) -> None:
    """The named times of all steps together are within 3 % of the steps' seconds."""
    for role in roles:
        rows = [row for row in records(out) if f"{role}/time/step" in row]
        named = sum(row[f"{role}/time/{name}"] for row in rows for name in METRICS.values())
        whole = sum(row[f"{role}/time/step"] for row in rows)
        assert 0.97 * whole <= named <= whole * (1 + 1e-9), f"{role}: {named / whole:.4f} of {whole:.2f} s"


def _check_trainer(spans: list[Span], steps: int) -> dict[int, str]:
    """Each part of each step once; steps follow each other without a gap, their parts are within them. Returns the
    label of each version."""
    of = {kind: [s for s in spans if s.kind == kind] for kind in {s.kind for s in spans}}
    for kind in ("step", "wait", "train", "apply", "claim", "read", "build", "record"):
        assert [s.args["step"] for s in of[kind]] == list(range(steps)), kind
    versions = [int(s.args["version"]) for s in of["publish"]]
    assert versions == list(range(steps + 1))
    assert all(before.end == after.start for before, after in pairwise(of["step"]))
    _check_nested([s for s in spans if s.lane == "main"])
    ends = {int(s.args["step"]): s for s in of["step"]}
    for kind in ("wait", "train", "apply"):
        assert all(_within(s, ends[int(s.args["step"])]) for s in of[kind]), kind
    assert all(_within(s, ends[version]) for version, s in enumerate(of["publish"][1:]))
    return {int(s.args["version"]): str(s.args["label"]) for s in of["publish"]}


def _check_weights(spans: list[Span], labels: dict[str, dict[int, str]]) -> None:
    """What a worker fetched and loaded was published under that label, and came once, in order."""
    for role, published in labels.items():
        lane = [s for s in spans if s.lane == f"weights {role}"]
        for kind in ("fetch", "update"):
            versions = [int(s.args["version"]) for s in lane if s.kind == kind]
            assert versions == sorted(set(versions)) and versions, (role, kind)
            assert all(published[int(s.args["version"])] == s.args["label"] for s in lane if s.kind == kind)


def _check_rollouts(spans: list[Span], recording: Recording) -> None:
    rollouts = [s for s in spans if s.kind == "rollout"]
    assert max(Counter(s.lane for s in rollouts).values()) == 1
    by_id = {s.lane: s for s in rollouts}
    assert set(recording.rollouts) <= set(by_id)
    lanes: dict[str, list[Span]] = {name: [] for name in by_id}
    for span in spans:
        if span.kind in ("invocation", "turn", "tool"):
            assert _within(span, by_id[span.lane]), span
            lanes[span.lane].append(span)
    for name, recorded in recording.rollouts.items():
        args = by_id[name].args
        assert (args["status"], args["failed_by"]) == (recorded.head.status, recorded.head.failed_by)
        assert args["split"] == ("train" if recorded.head.split == "train" else "eval")
        if recorded.head.status == "ok":
            assert args["correct"] == recorded.head.correct
            _check_attempt(lanes[name], int(args["attempts"]) - 1, recorded.body().trajectories)


def _check_attempt(spans: list[Span], attempt: int, trajectories: list[TrajectoryRecord]) -> None:
    """One invocation a trajectory, with a turn for each run of its sampled tokens."""
    mine = [s for s in spans if s.args["attempt"] == attempt]
    invocations = {(s.args["role"], s.args["invocation"]): s for s in mine if s.kind == "invocation"}
    assert len(invocations) == sum(s.kind == "invocation" for s in mine)
    assert set(invocations) == {(t.role, t.invocation) for t in trajectories}
    for trajectory in trajectories:
        place = trajectory.role, trajectory.invocation
        turns = [s for s in mine if s.kind == "turn" and (s.args["role"], s.args["invocation"]) == place]
        assert [s.args["turn"] for s in turns] == list(range(len(turns)))
        assert all(_within(s, invocations[place]) for s in turns)
        if trajectory.tokens:
            assert [s.args["sampled"] for s in turns] == list(_sampled(trajectory))


def _sampled(trajectory: TrajectoryRecord) -> Iterator[int]:
    """Lengths of the runs of sampled tokens; a turn always follows some context."""
    mask = np.frombuffer(trajectory.loss_mask, np.uint8)
    return (len(list(run)) for sampled, run in groupby(mask.tolist()) if sampled)


def _check_nested(spans: list[Span]) -> None:
    """Of one lane, by start: each lies within the one that is open, or after it."""
    open_: list[Span] = []
    for span in spans:
        while open_ and open_[-1].end <= span.start:
            open_.pop()
        assert not open_ or _within(span, open_[-1]), (open_[-1], span)
        open_.append(span)


def _within(inner: Span, outer: Span) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end
