"""A trainer's next step is prepared while it trains, and what was done is written beside the next step."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgrpo.config import load_config
from mgrpo.errors import DeadlineError, PeerError
from mgrpo.pipeline import step_reporter
from mgrpo.pipeline.feed import Feed, step_times
from mgrpo.pipeline.step_ahead import Closed, StepAhead
from mgrpo.pipeline.step_clock import METRICS
from mgrpo.pipeline.trainer_loop import TrainerLoop
from mgrpo.record import spans
from mgrpo.store.records import Control, World
from mgrpo.trainers.base import StepCost
from mgrpo.weights.publisher import VersionSize
from tests.runs import RELAY

SECONDS = 60.0  # for what the other thread does at once


class Store:
    """One role's part of the store: it writes down what reaches it."""

    def __init__(self, state: str = "running") -> None:
        self.state, self.epoch = state, 1
        self.events: list[str] = []
        self.reported: list[dict[str, float]] = []
        self.applied: list[tuple[list[str], list[str]]] = []
        self.hold = threading.Event()  # reports wait for it
        self.hold.set()

    def world(self) -> World:
        return World(True, Control(self.state), [], 0, 0)

    def apply(self, step: int, groups: list[str], surplus: list[str]) -> None:
        self.events.append(f"apply {step}")
        self.applied.append((groups, surplus))

    def status(self, version: int, step: int, checkpoint_step: int) -> None:
        self.events.append(f"publish {version}")

    def report(self, kind: str, payload: dict[str, object]) -> None:
        assert self.hold.wait(SECONDS)
        self.events.append(f"{kind} {payload['step']}")
        self.reported.append(payload["metrics"])  # type: ignore[arg-type]

    def commit(self, step: int) -> int:
        self.events.append(f"commit {step}")
        return 0

    def shorten_deadlines(self, seconds: float) -> None:
        pass


class Stream:
    """A role stream whose groups are always there, unless `claim` is another function."""

    def __init__(self, store: Store, claim: Callable[[int, Callable[[], bool]], None] | None = None) -> None:
        self.role, self.store, self._claim = "main", store, claim
        self.builder = SimpleNamespace(
            read=lambda step, groups: step, assemble=self.assemble, shares_prefixes=False
        )
        self.recorder = SimpleNamespace(
            step=lambda batch, metrics, settings: store.events.append(f"record {batch.step + 1}"),
            keep=lambda checkpoint: None,
        )
        self.trajectory_log = SimpleNamespace(truncate=lambda cursor: None)
        self.claimed: dict[int, threading.Event] = {step: threading.Event() for step in range(9)}

    def claim(self, step: int, is_wanted: Callable[[], bool]) -> list[object]:
        if self._claim is not None:
            self._claim(step, is_wanted)
        self.claimed[step].set()
        return []

    def assemble(self, step: int) -> SimpleNamespace:
        return SimpleNamespace(
            step=step, groups=["a"], surplus=["b"], minibatches=[], plans=[], metrics={"reward/mean": 0.5}
        )

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.store.events.append("close")


class Trainer:
    """A policy trainer: `during(step)` is what happens in a step; its checkpoints are durable when they are looked
    for."""

    def __init__(self, during: Callable[[int], None]) -> None:
        self._during, self._step, self._saved = during, 0, 0

    def train(self, batches: object, recompute_old: bool, lr: float) -> dict[str, float]:
        self._during(self._step)
        self._step += 1
        return {"loss/pg": 1.0}

    @contextlib.contextmanager
    def profiled(self, step: int, report: object) -> Iterator[None]:
        yield

    def cost(self) -> StepCost:
        return StepCost(flops=1e9, peak_flops=math.nan, peak_memory=3e9)

    def weights(self) -> Iterator[tuple[str, object]]:
        return iter(())

    def save(self, step: int) -> None:
        self._saved = step

    def saved(self, wait: bool) -> SimpleNamespace | None:
        saved, self._saved = self._saved, 0
        return SimpleNamespace(step=saved) if saved else None

    def note_cursors(self, checkpoint: object, cursors: dict[str, int]) -> dict[str, int]:
        return cursors

    def heartbeat(self) -> None:
        assert threading.current_thread() is threading.main_thread()


class Loop(TrainerLoop):
    """A trainer loop around them, without links, SFT and files. Used as a context manager."""

    def __init__(
        self, stream: Stream, during: Callable[[int], None] = lambda step: None, steps: int = 3
    ) -> None:
        config = load_config(RELAY, [f"trainer.steps={steps}", "trainer.checkpoint_every=2"])
        weights = SimpleNamespace(publish=lambda *_: None, close=lambda: None, size=VersionSize(5, 20))
        trainer = Trainer(during)
        feed = Feed(config, "main", Path(), [stream], weights, trainer.heartbeat)  # type: ignore[arg-type, list-item]
        super().__init__(feed, SimpleNamespace(), SimpleNamespace(), trainer)  # type: ignore[arg-type]

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *error: Any) -> None:
        self._feed.__exit__(*error)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """No thread is left behind."""
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("mgrpo-ahead", "mgrpo-report"))]


def test_the_next_step_is_claimed_while_this_one_trains() -> None:
    """train() of each step but the last returns only after the claim of the next one; none beyond the last is made."""
    stream = Stream(Store())

    def during(step: int) -> None:
        assert step == 2 or stream.claimed[step + 1].wait(SECONDS)

    with Loop(stream, during) as loop:
        loop._train()
    assert [step for step, event in stream.claimed.items() if event.is_set()] == [0, 1, 2]
    assert stream.store.applied == [(["a"], ["b"])] * 3


def test_a_run_that_ends_with_the_last_step_ends_the_training_well() -> None:
    """The worker may have evaluated the last weights before the trainer looks again: the final policy is still to be
    written."""
    store = Store()

    def status(version: int, step: int, checkpoint_step: int) -> None:
        store.state = "finished" if version == 3 else "running"

    store.status = status  # type: ignore[method-assign]
    with Loop(Stream(store)) as loop:
        loop._train()
    assert loop._feed.step == 3 and not loop._feed.stopped


def test_weights_are_published_before_the_step_is_written() -> None:
    """The record and reports of a step do not hold up its weights, nor the next step's training."""
    store = Store()
    store.hold.clear()

    def during(step: int) -> None:
        if step == 1:  # the first one's report is still on its way
            assert "publish 1" in store.events and "step 1" not in store.events
            store.hold.set()

    with Loop(Stream(store), during) as loop:
        loop._train()
        loop._feed.flush()
    assert [e for e in store.events if e.startswith("step")] == ["step 1", "step 2", "step 3"]
    for step in (1, 2, 3):
        assert store.events.index(f"publish {step}") < store.events.index(f"record {step}")


def test_a_step_is_recorded_and_reported_before_it_is_committed() -> None:
    """What is never handed out again is in the record."""
    store = Store()
    with Loop(Stream(store)) as loop:
        loop._train()
        loop._finish_checkpoint(wait=True)
    assert store.events.index("commit 1") > store.events.index("step 2")
    assert store.events.index("commit 2") > store.events.index("step 3")


def test_an_error_of_the_preparation_ends_the_trainer() -> None:
    """What the thread raises, the trainer raises when it would wait for the step."""

    def claim(step: int, is_wanted: Callable[[], bool]) -> None:
        if step == 1:
            raise PeerError("no such role")

    store = Store()
    with Loop(Stream(store, claim)) as loop, pytest.raises(PeerError, match="no such role"):
        loop._train()
    assert store.events[:2] == ["apply 0", "publish 1"] and store.events[-1] == "close"


def test_an_error_of_the_report_ends_the_trainer() -> None:
    """It is raised with the next step's, or at the flush after the last one."""
    store = Store()

    def report(kind: str, payload: dict[str, object]) -> None:
        raise PeerError("report refused")

    store.report = report  # type: ignore[method-assign]
    with Loop(Stream(store)) as loop, pytest.raises(PeerError, match="report refused"):
        loop._train()
    with Loop(Stream(store), steps=1) as loop, pytest.raises(PeerError, match="report refused"):
        loop._train()
    with Loop(Stream(store), lambda step: setattr(loop._feed, "_stop_requested", True), steps=1) as loop:
        loop._train()  # the store may have ended too: nobody reads the report


def test_a_stop_during_a_claim_ends_the_thread() -> None:
    """The run is over while the trainer waits for groups that never come."""
    looks = []

    def claim(step: int, is_wanted: Callable[[], bool]) -> None:
        while True:
            looks.append(is_wanted())
            pause.wait(0.01)

    pause = threading.Event()
    store = Store(state="finished")
    with Loop(Stream(store, claim)) as loop:
        loop._train()
        assert loop._feed.stopped and loop._feed.step == 0
        assert loop._feed._ahead._next is not None
        future = loop._feed._ahead._next
    assert isinstance(future.exception(SECONDS), Closed) and True in looks


def test_a_claim_knows_whether_the_trainer_waits() -> None:
    """A claim ahead of a step that trains on is not idle, however long the step takes."""
    wanted: list[bool] = []
    asked = threading.Event()

    def claim(step: int, is_wanted: Callable[[], bool]) -> None:
        if step == 1:
            wanted.append(is_wanted())
            asked.set()
            while not is_wanted():
                pause.wait(0.01)

    def during(step: int) -> None:
        assert step or asked.wait(SECONDS)

    pause = threading.Event()
    with Loop(Stream(Store(), claim), during, steps=2) as loop:
        loop._train()
    assert wanted == [False]


def test_a_writer_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the step before has a deadline."""
    monkeypatch.setattr(step_reporter, "WRITE_SECONDS", 0.05)
    store = Store()
    store.hold.clear()
    with Loop(Stream(store), steps=1) as loop:
        with pytest.raises(DeadlineError, match=r"trainer main: a step's record .* within 0\.05 s"):
            loop._train()
        store.hold.set()


def test_times_add_up() -> None:
    """The parts of a step are the step, in every report; what ran beside is no part of it."""
    store = Store()
    with Loop(Stream(store)) as loop:
        loop._train()
        loop._feed.flush()
    assert len(store.reported) == 3
    for row in store.reported:
        parts = [row[f"main/time/{name}"] for name in (*METRICS.values(), "other")]
        assert all(part >= 0 for part in parts) and sum(parts) == pytest.approx(
            row["main/time/step"], abs=1e-9
        )
        assert row["main/perf/idle"] == pytest.approx(row["main/time/wait_batch"] / row["main/time/step"])
        assert (row["main/weights/bytes"], row["main/weights/share"]) == (5, 0.25)
        assert {f"main/time/hidden_{name}" for name in ("claim", "read", "build", "record")} <= row.keys()
        assert row["main/perf/peak_mem_gb"] == 3.0 and "main/perf/mfu" not in row
        assert row["main/perf/tflops"] == pytest.approx(1e-3 / row["main/time/train"], rel=1e-6)


def test_only_what_passed_before_the_trainer_waited_was_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim of 8 seconds of which the trainer saw the last 3, then 2 of reading: 5 are hidden."""
    from mgrpo.pipeline.step_ahead import _Part

    ahead = StepAhead([], 1)
    ends = {"claim": (100, 108), "read": (108, 110), "build": (110, 110)}
    parts = [_Part(name, began * 10**9, ended * 10**9) for name, (began, ended) in ends.items()]
    ahead._next = ahead._executor.submit(lambda: ([], parts))
    monkeypatch.setattr(spans, "now", lambda: 105 * 10**9)
    prepared = ahead.take(0, lambda: None)
    ahead.close()
    assert prepared.hidden == {"claim": 5.0, "read": 0.0, "build": 0.0}
    times = step_times({"step": 10.0, "wait_batch": 5.0}, prepared.hidden)
    assert times["time/hidden_claim"] == 5.0 and times["perf/idle"] == 0.5
