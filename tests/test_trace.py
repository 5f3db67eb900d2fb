"""The timeline of a run as a Perfetto file: every span once, nested, on a track of its own, and what led to what."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.config import dump_config, load_config
from mgrpo.config.run import RecordConfig
from mgrpo.errors import ConfigError
from mgrpo.record.reader import Recording
from mgrpo.record.schema import StepBody, StepHead, StepSettings
from mgrpo.record.spans import Args, Span, SpanLog
from mgrpo.record.writer import RecordWriter
from mgrpo.trace.arrows import find_arrows
from mgrpo.trace.export import Steps, export
from mgrpo.trace.layout import Track, depths, forward, tracks
from mgrpo.trace.perfetto import MISSING, events, protocol, write_trace
from mgrpo.trace.slowest import slowest
from tests.runs import RELAY, command, finish
from tests.trace_check import Slice, processed, processor, read_trace

EPOCH = 1_790_000_000_000_000_000  # Unix ns
MS = 1_000_000
MAIN_TURN: Args = {"role": "main", "invocation": 0, "attempt": 0}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def span(kind: str, lane: str, start: float, end: float, name: str = "", **args: int | float | str) -> Span:
    """Times in ms."""
    return Span(kind, name or kind, lane, EPOCH + int(start * MS), EPOCH + int(end * MS), args)


def sub(number: int) -> Args:
    return {"role": "sub", "invocation": number, "attempt": 0}


def written(path: Path, processes: Mapping[str, Sequence[Span]]) -> list[Slice]:
    ready = {process: list(map(forward, spans)) for process, spans in processes.items()}
    with path.open("wb") as file:
        write_trace(file, ready, find_arrows(ready))
    return read_trace(path)


def shown(found: Iterable[Track]) -> dict[str, list[tuple[str, int]]]:
    return {t.name: [(s.name, d) for s, d in zip(t.spans, depths(t.spans), strict=True)] for t in found}


# -- every span once, nested -----------------------------------------------------------------------------------------

KINDS = (
    "rollout",
    "invocation",
    "turn",
    "tool",
    "step",
    "train",
    "stage",
    "publish",
    "update",
    'of a later version "\x00\u202e<b>',
)
SPAN = st.builds(
    lambda kind, lane, start, length, invocation: Span(
        kind, f"{kind} {invocation}", lane, EPOCH + start, EPOCH + start + length,
        {"role": "main" if invocation == 0 else "sub", "invocation": invocation, "attempt": 0, "version": start % 3,
     "label": f"main.e1.v{start % 3}"},
    ),
    st.sampled_from(KINDS), st.sampled_from(["q/0", "q/1", "q/2", "main", "weights main"]),
    st.integers(0, 20), st.integers(-2, 8), st.integers(0, 3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(processes=st.dictionaries(st.sampled_from(["rollout-0", "trainer main"]), st.lists(SPAN, max_size=40)))
def test_every_span_is_there_once_and_nested(
    processes: dict[str, list[Span]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever overlaps, touches, is empty or ends before it starts: the strict reader finds each span with its times,
    and tells apart what was concurrent."""
    path = tmp_path_factory.getbasetemp() / "random.pftrace"
    found = Counter((s.process, s.kind, s.name, s.start, s.end) for s in written(path, processes))
    wanted = Counter(
        (process, s.kind, s.name, s.start, max(s.start, s.end))
        for process, spans in processes.items()
        for s in spans
    )
    assert found == wanted
    for spans in processes.values():
        for track in tracks(spans):
            assert [s.start for s in track.spans] == sorted(s.start for s in track.spans)
            for one, other in ((a, b) for i, a in enumerate(track.spans) for b in track.spans[i + 1 :]):
                assert other.start >= one.end or other.end <= one.end, "spans of a track cross"
            assert [d for begins, d, _ in events(track.spans) if begins] == depths(track.spans)


def test_a_broken_trace_is_refused(tmp_path: Path) -> None:
    """The strict reader is strict: without one of its packets no trace is read."""
    path, pb = tmp_path / "whole.pftrace", protocol()
    written(
        path,
        {"rollout-0": [span("rollout", "q/0", 0, 9, **MAIN_TURN), span("turn", "q/0", 1, 2, **MAIN_TURN)]},
    )
    whole = pb.Trace.FromString(path.read_bytes())
    assert len(whole.packet) == 3 + 4  # clock, process, track; two spans
    for left_out in range(len(whole.packet)):
        broken = pb.Trace(packet=[p for i, p in enumerate(whole.packet) if i != left_out])
        path.write_bytes(broken.SerializeToString())
        with pytest.raises((AssertionError, KeyError, IndexError)):
            read_trace(path)


# -- tracks ----------------------------------------------------------------------------------------------------------


def test_rollouts_take_the_lowest_free_place() -> None:
    """As many places as were played at once; one that is left is taken again."""
    spans = [
        span("rollout", "a", 0, 10, "a"), span("rollout", "b", 1, 5, "b"), span("rollout", "c", 2, 9, "c"),
        span("rollout", "d", 5, 12, "d"), span("rollout", "e", 10, 11, "e"), span("rollout", "a", 20, 21, "a"),
    ]  # fmt: skip
    assert shown(tracks(spans)) == {
        "place 1": [("a", 0), ("e", 0), ("a", 0)],  # a was played again after a restart
        "place 2": [("b", 0), ("d", 0)],
        "place 3": [("c", 0)],
    }


def test_parallel_sub_agents_have_tracks_below_their_rollout() -> None:
    """A call that the main agent waits for is drawn within its invocation; a second one at the same time, with its
    turns and tools, beside it."""
    spans = [
        span("rollout", "q/0", 0, 100, "q/0"),
        span("invocation", "q/0", 0, 99, "main", **MAIN_TURN),
        span("turn", "q/0", 1, 10, "plan", **MAIN_TURN),
        span("invocation", "q/0", 10, 50, "first", **sub(1)),
        span("turn", "q/0", 11, 20, "first turn", **sub(1)),
        span("invocation", "q/0", 10.5, 60, "second", **sub(2)),
        span("turn", "q/0", 12, 30, "second turn", **sub(2)),
        span("tool", "q/0", 21, 29, "search"),
        span("tool", "q/0", 31, 40, "visit"),
        span("tool", "q/0", 32, 41, "visit too"),
        span("turn", "q/0", 61, 90, "answer", **MAIN_TURN),
    ]
    assert shown(tracks(spans)) == {
        "place 1": [
            *(
                ("q/0", 0),
                ("main", 1),
                ("plan", 2),
                ("first", 2),
                ("first turn", 3),
                ("search", 3),
                ("visit", 3),
            ),
            ("answer", 2),
        ],
        "place 1 / 2": [("second", 0), ("second turn", 1), ("visit too", 1)],
    }


def test_lanes_come_in_order_and_what_is_concurrent_has_a_row_more() -> None:
    """main, ahead, record, then the others; a stage is within its step though both have the same times."""
    spans = [
        span("publish", "main", 9, 12, "late"), span("stage", "main", 0, 10, "forward"),
        span("step", "main", 0, 10, "step"), span("update", "weights sub", 3, 4, "update"),
        span("claim", "ahead", 1, 2, "claim"), span("evaluation", "evaluation", 1, 2, "heldout"),
    ]  # fmt: skip
    found = tracks(spans)
    assert shown(found) == {
        "main": [("step", 0), ("forward", 1)],
        "main / 2": [("late", 0)],
        "ahead": [("claim", 0)],
        "evaluation": [("heldout", 0)],
        "weights sub": [("update", 0)],
    }
    assert [track.depth for track in found] == [0, 1, 0, 0, 0]
    assert forward(Span("turn", "t", "l", 5, 3)).end == 5


# -- arrows ----------------------------------------------------------------------------------------------------------


def team(skew: float = 0.0) -> dict[str, list[Span]]:
    """A trainer and a worker whose clock is `skew` ms ahead."""

    def there(s: Span) -> Span:
        return msgspec.structs.replace(s, start=s.start + int(skew * MS), end=s.end + int(skew * MS))

    trainer = [
        span("publish", "main", 0, 5, version=0, label="main.e1.v0"),
        span("claim", "ahead", 6, 40, step=0, groups=1),
        span("read", "ahead", 40, 41, step=0),
        span("step", "main", 5, 50, step=0),
        span("publish", "main", 51, 55, version=1, label="main.e1.v1"),
        span("step", "main", 55, 90, step=1),
    ]
    worker = [
        span("update", "weights main", 2, 6, version=0, label="main.e1.v0"),
        span("rollout", "q/0", 7, 30, "q/0", split="train"),
        span("turn", "q/0", 8, 9, "first", **MAIN_TURN, version=0),
        span("turn", "q/0", 10, 11, "second", **MAIN_TURN, version=0),
        span("rollout", "q/1", 8, 31, "q/1", split="train"),
        span("turn", "q/1", 12, 13, "of a role that shares", role="sub", invocation=0, attempt=0, version=0),
        span("update", "weights main", 52, 60, version=1, label="main.e1.v1"),
    ]
    return {"rollout-0": [there(s) for s in worker], "trainer main": trainer}


def run_folder(folder: Path, processes: Mapping[str, Sequence[Span]]) -> Path:
    """A run as its processes leave it: config, spans, and the record of step 0."""
    folder.mkdir()
    dump_config(load_config(RELAY), folder / "config.json")
    for process, spans in processes.items():
        name, _, role = process.partition(" ")
        own = folder / (f"agents/{role}/record" if role else f"rollouts/{name.split('-')[1]}")
        log = SpanLog(RecordConfig(), own, process, pytest.fail)
        for s in spans:
            log.add(s)
        log.close()
    body = StepBody(StepSettings(0.1, 1, 1), 2, ["q"], [0], [], [0.0], [0.0], b"", [], [], {})
    writer = RecordWriter(folder / "agents/main/record", 1 << 20, pytest.fail)
    writer.append(0, msgspec.msgpack.encode(StepHead("main", 0)), msgspec.msgpack.encode(body))
    writer.close()
    return folder


def pairs(slices: Sequence[Slice]) -> set[tuple[str, str]]:
    left = {flow: s for s in slices for flow in s.leaving}
    return {(left[flow].name, s.name) for s in slices for flow in s.arriving}


def test_arrows_lead_from_weights_to_turns_and_from_rollouts_to_steps(tmp_path: Path) -> None:
    """publish -> update -> the first turn, and each rollout -> the step that read it, by the step's record."""
    run = run_folder(tmp_path / "run", team())
    done = export([run], None, None, quiet)
    assert done.file == run / "trace.pftrace" and done.size == done.file.stat().st_size
    assert done.arrows.counts == {"publish -> update": 2, "update -> turn": 1, "rollout -> read": 2}
    found = pairs(read_trace(done.file))
    assert found == {("publish", "update"), ("update", "first"), ("q/0", "read"), ("q/1", "read")}
    shared = find_arrows(team(), Recording([run]), {"main": "main", "sub": "main"})
    assert shared.counts == done.arrows.counts  # whichever role of the policy is first


def test_arrows_back_in_time_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of servers whose clocks differ: one line says how many and by how much."""
    run = run_folder(tmp_path / "run", team(skew=-30))
    done = export([run], None, None, quiet)
    assert done.arrows.counts == {"update -> turn": 1, "rollout -> read": 2}
    assert (done.arrows.backwards, done.arrows.most_ns) == (2, 29 * MS)
    assert any("2 arrows would go back in time, by up to 29.0 ms" in line for line in done.lines())
    read_trace(done.file)


# -- the command -----------------------------------------------------------------------------------------------------


def test_steps_choose_a_window(tmp_path: Path) -> None:
    """What touches the chosen steps is kept whole; steps count from 1, as in the logs."""
    run = run_folder(tmp_path / "run", team())
    first = export([run], tmp_path / "first.pftrace", Steps.parse("1", None), quiet)
    last = export([run], tmp_path / "last.pftrace", Steps.parse(None, 1), quiet)
    assert first.counts == Counter(
        s.kind for spans in team().values() for s in spans if s.start < EPOCH + 51 * MS
    )
    assert last.counts == {"publish": 1, "update": 1, "step": 1}
    assert export([run], None, Steps.parse("1:9", None), quiet).counts["step"] == 2
    assert (
        first.notes == []
        and "nothing of these steps: rollout-0 ("
        in export(
            [run_folder(tmp_path / "skewed", team(skew=5000))], None, Steps.parse("1", None), quiet
        ).lines()[2]
    )
    with pytest.raises(
        ConfigError, match=r"--steps 7:9: none of them is in the record, which has steps 1 to 2"
    ):
        export([run], None, Steps.parse("7:9", None), quiet)


@pytest.mark.parametrize("steps", ["0:3", "3:1", "a", "1:b", "-1", "1:2:3", ""])
def test_steps_that_are_none_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match="expected FIRST:LAST"):
        Steps.parse(steps, None)


def test_bad_calls_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    """A folder that is no run, a run without spans, a file that cannot be: each is named."""
    with pytest.raises(ConfigError, match="exclude each other"):
        Steps.parse("1:2", 3)
    with pytest.raises(ConfigError, match="--last 0"):
        Steps.parse(None, 0)
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        export([tmp_path / "nowhere"], None, None, quiet)
    with pytest.raises(ConfigError, match=r"not a run's folder \(no config.json\)"):
        export([tmp_path], None, None, quiet)
    empty = run_folder(tmp_path / "empty", {})
    with pytest.raises(ConfigError, match=r"no spans are recorded there .*record\.spans"):
        export([empty], None, None, quiet)
    run = run_folder(tmp_path / "run", {"rollout-0": [span("turn", "q/0", 0, 1)]})
    with pytest.raises(ConfigError, match="no step of a trainer is in the record"):
        export([run], None, Steps.parse(None, 1), quiet)
    with pytest.raises(ConfigError, match="its folder does not exist"):
        export([run], tmp_path / "none" / "x", None, quiet)
    with pytest.raises(ConfigError, match="is a folder"):
        export([run], tmp_path, None, quiet)
    os.mkfifo(tmp_path / "pipe")  # as a device: the trace must not take its name
    with pytest.raises(ConfigError, match="is there already and is no file"):
        export([run], tmp_path / "pipe", None, quiet)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(ConfigError, match=r"--out .*: cannot be written \(File name too long\)"):
        export([run], tmp_path / ("x" * 250), None, quiet)
    assert not [p for p in tmp_path.rglob("*") if "pftrace" in p.name]


def test_what_the_spans_lack_is_said(tmp_path: Path) -> None:
    """Where recording stopped, and files that record.max_mb has deleted; without a gap there is no such line."""
    run = run_folder(tmp_path / "run", team())
    assert export([run], None, None, quiet).notes == []
    folder = run / "rollouts/0/spans"
    last = folder / "000004.rec"
    last.write_bytes((folder / "000001.rec").read_bytes())
    log = RecordWriter(folder, 1 << 20, lambda line: None)
    log.note("recording stopped at step 0: No space left on device")
    log.close()
    said = export([run], None, None, quiet).lines()
    assert f"{folder}: 2 files after the first are gone, deleted to stay within record.max_mb" in said
    assert f"{folder}: recording stopped at step 0: No space left on device" in said


def test_folders_of_several_servers_make_one_trace(tmp_path: Path) -> None:
    """The launcher's first; processes of all are there, each once."""
    processes = team()
    here = run_folder(tmp_path / "here", {"trainer main": processes["trainer main"]})
    there = run_folder(tmp_path / "there", {"rollout-0": processes["rollout-0"]})
    done = export([here, there], None, None, quiet)
    assert done.processes == 2 and done.arrows.counts["publish -> update"] == 2
    assert {s.process for s in read_trace(done.file)} == set(processes)


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    """One line each for the file, the spans by kind, the arrows, and how to open it."""
    run = run_folder(tmp_path / "run", team())
    said = finish(command("trace", str(run), "--last", "2"), 120)
    assert "13 spans of 2 processes" in said and "3 turn" in said
    assert "2 publish -> update" in said and "ui.perfetto.dev" in said
    assert (run / "trace.pftrace").exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read."""
    monkeypatch.setitem(sys.modules, "perfetto.protos.perfetto.trace", None)
    with pytest.raises(ConfigError) as caught:
        export([tmp_path / "nowhere"], None, None, quiet)
    assert str(caught.value) == MISSING


@pytest.mark.skipif(
    processor() is None, reason="needs trace_processor_shell ($MGRPO_TRACE_PROCESSOR or on PATH)"
)
def test_perfettos_own_trace_processor_agrees(tmp_path: Path) -> None:
    """It finds no error, and counts the same slices and arrows."""
    done = export([run_folder(tmp_path / "run", team())], None, None, quiet)
    binary = processor()
    assert binary is not None
    assert processed(done.file, binary) == (done.counts, sum(done.arrows.counts.values()))


# -- the slowest -----------------------------------------------------------------------------------------------------


def test_the_slowest_come_first() -> None:
    """Of all processes, of one kind, no more than asked for."""
    spans = {
        "b": [span("turn", "q/0", i, i + length, f"b{length}") for i, length in enumerate((3, 9, 1))],
        "a": [span("turn", "q/1", 0, 9, "a9"), span("tool", "q/1", 0, 50, "tool")],
    }
    assert [(p, s.name) for p, s in slowest(spans, "turn", 3)] == [("a", "a9"), ("b", "b9"), ("b", "b3")]
    assert [s.name for _, s in slowest(spans, "tool")] == ["tool"] and slowest(spans, "step") == []
