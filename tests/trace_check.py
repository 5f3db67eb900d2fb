"""Reads a Perfetto trace back as strictly as Perfetto's trace processor does, and compares one with a run's record."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.config import load_config
from mgrpo.record.reader import Recording
from mgrpo.record.schema import RolloutBody, TrajectoryRecord
from mgrpo.record.span_reader import SpanReader
from mgrpo.trace.export import Written, export
from mgrpo.trace.perfetto import protocol
from mgrpo.types import MAIN


@dataclass
class Slice:
    """One of a trace; times in Unix ns. track: names from the process's track down."""

    process: str
    track: tuple[str, ...]
    kind: str
    name: str
    start: int
    depth: int
    args: dict[str, object]
    end: int = -1
    leaving: list[int] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)


def read_trace(path: Path) -> list[Slice]:
    """The slices of a trace. Asserts what the trace processor counts as an error: every track is described once and
    hangs below a process, interned strings are known, the events of a sequence are in order of time, every end has its
    beginning on the same track, nothing stays open, and a flow leaves and arrives once, not back in time."""
    pb = protocol()
    packets = _packets(path.read_bytes(), pb)
    first, tracks, offset = _tracks(packets)
    slices: list[Slice] = []
    sequences: dict[int, dict[str, Any]] = {}
    stacks: dict[int, list[Slice]] = {}
    owner: dict[int, int] = {}  # track -> its sequence
    for packet in itertools.chain(first, packets):
        number = packet.trusted_packet_sequence_id
        assert number, "a packet without a sequence"
        assert packet.HasField("track_event"), "descriptors come before all events"
        if packet.sequence_flags & pb.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            defaults = packet.trace_packet_defaults.track_event_defaults
            sequences[number] = {"track": defaults.track_uuid, "time": -1}
        assert packet.sequence_flags & pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        state = sequences[number]
        for table in ("event_categories", "event_names", "debug_annotation_names"):
            known = state.setdefault(table, {})
            for entry in getattr(packet.interned_data, table):
                assert entry.iid and entry.iid not in known
                known[entry.iid] = entry.name
        event = packet.track_event
        uuid = event.track_uuid or state["track"]
        assert uuid in tracks and owner.setdefault(uuid, number) == number
        assert packet.timestamp >= max(0, state["time"]), "time goes back within a sequence"
        state["time"] = packet.timestamp
        stack, at = stacks.setdefault(uuid, []), packet.timestamp + offset
        if event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
            process, names = tracks[uuid]
            kind = state["event_categories"][event.category_iids[0]]
            name = state["event_names"][event.name_iid] if event.name_iid else event.name
            args = {state["debug_annotation_names"][a.name_iid]: _value(a) for a in event.debug_annotations}
            assert len(args) == len(event.debug_annotations) and len(event.category_iids) == 1
            stack.append(Slice(process, names, kind, name, at, len(stack), args))
            stack[-1].leaving, stack[-1].arriving = list(event.flow_ids), list(event.terminating_flow_ids)
            slices.append(stack[-1])
        else:
            assert event.type == pb.TrackEvent.TYPE_SLICE_END
            stack.pop().end = at  # raises for an end without a beginning
    assert not any(stacks.values()), "slices stay open"
    _check_flows(slices)
    return slices


def _packets(data: bytes, pb: Any) -> Iterator[Any]:
    """The packets of a trace, one at a time: field 1 of the message Trace, each with its length."""
    at, view = 0, memoryview(data)
    while at < len(data):
        assert data[at] == 0x0A, f"byte {at} begins no packet"
        size, shift, at = 0, 0, at + 1
        while True:
            size |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 0x80:
                break
        assert at + size <= len(data), "the last packet is cut off"
        yield pb.TracePacket.FromString(view[at : at + size])
        at += size


def _tracks(packets: Iterator[Any]) -> tuple[list[Any], dict[int, tuple[str, tuple[str, ...]]], int]:
    """Takes off what comes before the first event. That event; track -> (process, names from there down); Unix ns at
    the trace's time 0."""
    described: dict[int, Any] = {}
    offset, first = None, []
    for packet in packets:
        if packet.HasField("track_event"):
            first = [packet]
            break
        if packet.HasField("track_descriptor"):
            assert packet.track_descriptor.uuid not in described
            described[packet.track_descriptor.uuid] = packet.track_descriptor
        if packet.HasField("clock_snapshot"):
            clocks = {clock.clock_id: clock.timestamp for clock in packet.clock_snapshot.clocks}
            offset = clocks[1] - clocks[6]  # REALTIME, BOOTTIME, which packets have where they name none
    assert offset is not None
    pids = [d.process.pid for d in described.values() if d.HasField("process")]
    assert len(set(pids)) == len(pids) and 0 not in pids
    siblings = Counter((d.parent_uuid, d.name) for d in described.values() if d.parent_uuid)
    assert max(siblings.values(), default=1) == 1, "the page draws tracks of one name as one"
    found = {}
    for uuid, descriptor in described.items():
        names: tuple[str, ...] = ()
        while not descriptor.HasField("process"):
            names = (descriptor.name, *names)
            descriptor = described[descriptor.parent_uuid]
        found[uuid] = descriptor.process.process_name, names
    return first, found, offset


def _value(annotation: Any) -> object:
    return getattr(annotation, annotation.WhichOneof("value"))


def _check_flows(slices: list[Slice]) -> None:
    left = [(flow, s.start) for s in slices for flow in s.leaving]
    arrived = {flow: s.start for s in slices for flow in s.arriving}
    assert len(left) == len(dict(left)) == len(arrived) == sum(len(s.arriving) for s in slices)
    assert dict(left).keys() == arrived.keys() and all(arrived[flow] >= start for flow, start in left)


def processor() -> str | None:
    """Path of Perfetto's trace processor on this machine; None: there is none."""
    return os.environ.get("MGRPO_TRACE_PROCESSOR") or shutil.which("trace_processor_shell")


def processed(path: Path, binary: str) -> tuple[dict[str, int], int]:
    """Slices by kind and number of flows, as Perfetto's trace processor counts them. Asserts that it saw no error."""
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    with TraceProcessor(trace=str(path), config=TraceProcessorConfig(bin_path=binary)) as trace:
        errors = trace.query("select name, value from stats where severity != 'info' and value > 0")
        assert [(row.name, row.value) for row in errors] == []
        kinds = trace.query("select category, count(*) as n from slice where dur >= 0 group by category")
        flows = next(iter(trace.query("select count(*) as n from flow")))
        return {row.category: row.n for row in kinds}, flows.n


def turns(trajectory: TrajectoryRecord) -> int:
    """Turns of a trajectory whose tokens are kept: runs of sampled tokens within a segment."""
    mask = np.frombuffer(trajectory.loss_mask, np.uint8) != 0
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    starts[list(trajectory.segment_starts)] |= mask[list(trajectory.segment_starts)]
    return int(starts.sum())


def tools_of_sub_agents(body: RolloutBody) -> int:
    """Tool calls of a rollout in which whatever a sub-agent reads after a turn is what a tool gave it (atlas)."""
    found = 0
    for trajectory in body.trajectories:
        if trajectory.role != MAIN:
            mask = np.frombuffer(trajectory.loss_mask, np.uint8) != 0
            found += int((mask[:-1] & ~mask[1:]).sum())
    return found


def check_trace(run: Path, tools: Callable[[RolloutBody], int] | None = None) -> Written:
    """Write a finished run's trace, read it back, and compare it with the record: every rollout, invocation, turn and
    tool call that the record has, every claim, step, publish and update is there once. tools: how many tool calls a
    rollout whose tokens are kept has made; None: by its info["tools"]. For a run that was not resumed."""
    config, recording = load_config(run / "config.json"), Recording([run])
    written = export([run], run / "check.pftrace", None, lambda done, total: None)
    slices = read_trace(written.file)
    kinds = Counter(s.kind for s in slices)
    assert dict(kinds) == dict(written.counts)
    assert kinds == Counter(s.kind for spans in SpanReader([run]).spans().values() for s in spans)
    assert all(s.end >= s.start for s in slices)
    _check_rollouts(slices, recording, tools)
    _check_steps(slices, recording, {role: config.policy_of(role) for role in config.roles})
    if (binary := processor()) is not None:
        flows = sum(written.arrows.counts.values())
        assert processed(written.file, binary) == (dict(kinds), flows)
    return written


def _check_rollouts(
    slices: list[Slice], recording: Recording, tools: Callable[[RolloutBody], int] | None
) -> None:
    played = [s for s in slices if s.kind == "rollout" and s.args["split"] == "train"]
    recorded = {id: r for id, r in recording.rollouts.items() if r.head.split == "train"}
    assert sorted(s.name for s in played if s.args["status"] != "cancelled") == sorted(recorded)
    parts: dict[str, list[Slice]] = {}
    for s in slices:
        if s.kind in ("invocation", "turn", "tool"):
            parts.setdefault(str(s.args.get("rollout", "")), []).append(s)
    inside = _inside(slices)
    for rollout in played:
        if rollout.name not in recorded or recorded[rollout.name].head.status != "ok":
            continue
        body = recorded[rollout.name].body()
        own = inside[rollout.name] + parts.get(rollout.name, [])
        last = int(str(rollout.args["attempts"])) - 1
        mine = [s for s in own if s.args.get("attempt", last) == last]
        invocations = [(s.args["role"], s.args["invocation"]) for s in mine if s.kind == "invocation"]
        expected = [(t.role, t.invocation) for t in body.trajectories]
        assert sorted(invocations, key=str) == sorted(expected, key=str), rollout.name
        found = Counter((s.args["role"], s.args["invocation"]) for s in mine if s.kind == "turn")
        for trajectory in body.trajectories:
            if trajectory.tokens:
                assert found[trajectory.role, trajectory.invocation] == turns(trajectory), rollout.name
        calls = len([s for s in mine if s.kind == "tool"])
        if isinstance(known := body.info.get("tools"), list):
            assert calls == len(known), rollout.name
        elif tools is not None and all(t.tokens for t in body.trajectories):
            assert calls == tools(body), rollout.name


def _inside(slices: list[Slice]) -> dict[str, list[Slice]]:
    """Rollout -> what is nested in it on its own track. What is beside it names it (args["rollout"])."""
    inside: dict[str, list[Slice]] = {s.name: [] for s in slices if s.kind == "rollout"}
    current: dict[tuple[str, tuple[str, ...]], Slice] = {}
    for s in sorted(slices, key=lambda s: (s.start, s.depth)):
        top = current.get((s.process, s.track))
        if s.kind == "rollout":
            current[s.process, s.track] = s
        elif (
            top is not None
            and s.depth
            and s.start >= top.start
            and s.end <= top.end
            and s.args.get("attempt") is not None
        ):
            inside[top.name].append(s)
    return inside


def _check_steps(slices: list[Slice], recording: Recording, policies: dict[str, str]) -> None:
    trainers = {f"trainer {role}" for role in policies.values()}
    for process in trainers & {s.process for s in slices}:
        role = process.removeprefix("trainer ")
        steps = sorted({step for r, step in recording.steps if policies[r] == role})
        for kind in ("claim", "read", "build", "step", "train", "apply", "record"):
            found = sorted(int(str(s.args["step"])) for s in slices if (s.process, s.kind) == (process, kind))
            assert found == steps, f"{process}: {kind}"
        versions = [s.args["version"] for s in slices if (s.process, s.kind) == (process, "publish")]
        assert versions == list(range(len(steps) + 1)), process
    labels = {s.args["label"] for s in slices if s.kind == "publish"}
    updates = Counter((s.process, s.args["label"]) for s in slices if s.kind == "update")
    assert set(updates.values()) <= {1} and {label for _, label in updates} <= labels
    assert {s.process for s in slices if s.kind == "turn"} <= {process for process, _ in updates}
    # Each version that a worker has sampled from has come there.
    arrived = {(s.process, s.track[0].split()[1], s.args["version"]) for s in slices if s.kind == "update"}
    for s in slices:
        if s.kind == "turn":
            assert (s.process, policies[str(s.args["role"])], s.args["version"]) in arrived, s
