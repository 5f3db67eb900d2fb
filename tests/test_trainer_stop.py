"""A trainer that is told to stop: what it does depends on what it has to save. And one that nobody can reach."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgrpo.errors import DeadlineError, MgrpoError
from mgrpo.pipeline import trainer_loop
from mgrpo.pipeline.feed import Feed, FeedStep, Shutdown
from mgrpo.pipeline.step_clock import StepClock
from mgrpo.pipeline.trainer_loop import TrainerLoop
from mgrpo.transport.server import Server
from tests.runs import wait_for


class BareFeed(Feed):
    """A feed without processes around it: the first step after `stop_at` steps asks for the stop."""

    def __init__(self, begun: int, stop_at: int) -> None:
        self._streams, self._handlers, self._stop_requested, self.stopped = [], {}, False, False
        self.step = self.saved_step = begun
        self.role, self.folder, self._begun, self._stop_at = "main", Path(), None, stop_at
        engine = SimpleNamespace(direct=False, probed=False)
        self.agent = SimpleNamespace(frozen=False, model="folder", engine=engine)  # type: ignore[assignment]
        self.config = SimpleNamespace(trainer=SimpleNamespace(checkpoint_every=100, steps=200))  # type: ignore[assignment]
        self._heartbeat, self._clock = lambda: None, StepClock("main")
        self._ahead = SimpleNamespace(stop=lambda: None)  # type: ignore[assignment]
        self._reporter = SimpleNamespace(flush=lambda: None)  # type: ignore[assignment]
        self._weights = SimpleNamespace(describe=lambda files: None)  # type: ignore[assignment]

    def publish(self, tensors: object, probe: object = None) -> None:
        pass

    def report(self, kind: str, payload: dict[str, object]) -> None:
        pass

    def _next(self) -> FeedStep:
        if self.step == self._stop_at:
            self._on_signal(signal.SIGTERM, None)
            self.check_stop()
        return FeedStep(self.step, 0.1, False, [], [])

    def applied(self, metrics: object, cost: object = None) -> None:
        self.step += 1


class Bare(TrainerLoop):
    """A trainer loop on it; its checkpoints are written down."""

    def __init__(self, begun: int, stop_at: int) -> None:
        self.events: list[str] = []
        self.feed = BareFeed(begun, stop_at)
        trainer: Any = SimpleNamespace(
            load=lambda start: SimpleNamespace(step=begun, passed_over=()) if begun else None,
            shares_prefixes=False,
            why_not_shared="",
            policy_files=dict,
            train=lambda batches, recompute, lr: {},
            profiled=lambda step, report: contextlib.nullcontext(),
            cost=lambda: None,
            weights=lambda: iter(()),
            save=lambda step: self.events.append(f"checkpoint {step}"),
            saved=self.settle,
            close=lambda: self.events.append("end"),
            note_cursors=lambda checkpoint, cursors: cursors,
        )
        super().__init__(self.feed, SimpleNamespace(chat=False), SimpleNamespace(), trainer)  # type: ignore[arg-type]

    def settle(self, wait: bool) -> object:
        if wait:
            self.events.append("durable")
        return None


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The test's own signal handlers come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("begun", "stop_at", "events"),
    [
        (0, 7, ["durable", "checkpoint 7", "durable", "profile", "end"]),
        (5, 6, ["durable", "checkpoint 6", "durable", "profile", "end"]),
        (5, 5, ["durable", "profile", "end"]),  # nothing since the last one
    ],
)
def test_a_stop_while_waiting_saves_the_last_step(
    begun: int, stop_at: int, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the loop is when the stop is noticed: the steps since the last checkpoint are saved before it leaves,
    and before a profile is written, which may take longer than the supervisor waits."""
    trainer = Bare(begun, stop_at)
    monkeypatch.setattr(trainer_loop, "close_window", lambda: trainer.events.append("profile"))
    trainer.feed._streams = [stream(commit=lambda step: 0)]  # type: ignore[list-item]
    trainer.run()
    assert trainer.events == events


def test_a_store_that_has_ended_too_costs_no_checkpoint() -> None:
    """The launcher was killed, say: the commit of an earlier checkpoint gets no answer, and the last step is saved all
    the same. While the run goes on the same silence is an error."""

    def silent(step: int) -> int:
        raise DeadlineError("store at ipc:///x: no answer to commit within 5 s")

    trainer = Bare(0, 7)
    trainer.settle = lambda wait: SimpleNamespace(step=5) if wait else None  # type: ignore[method-assign]
    trainer._trainer.saved = trainer.settle  # type: ignore[method-assign]
    trainer.feed._streams = [stream(commit=silent)]  # type: ignore[list-item]
    trainer.run()
    assert trainer.events == ["checkpoint 7", "end"]
    trainer.feed._stop_requested = False
    with pytest.raises(DeadlineError):
        trainer._finish_checkpoint(wait=True)


def stream(**store: object) -> SimpleNamespace:
    usual = {
        "shorten_deadlines": lambda seconds: None,
        "resume": lambda checkpoint_step: SimpleNamespace(requeued=0),
    }
    return SimpleNamespace(
        role="main",
        store=SimpleNamespace(**usual, **store),
        trajectory_log=SimpleNamespace(truncate=lambda cursor: None, segments=lambda: [1], path=Path()),
        recorder=SimpleNamespace(begin=lambda step: None, keep=lambda saved: None),
        check=lambda: None,
    )


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint() -> None:
    """In the terminal of a trainer that was started by hand the first one saves, the next one has its usual effect."""
    usual = signal.getsignal(signal.SIGINT)
    feed = BareFeed(0, 1)
    feed._catch_signals()
    assert signal.getsignal(signal.SIGINT) == feed._on_signal
    feed._on_signal(signal.SIGINT, None)
    assert feed._stop_requested and signal.getsignal(signal.SIGINT) is usual
    with pytest.raises(Shutdown):
        feed.check_stop()


def test_a_trainer_whose_address_is_served_no_more_ends(tmp_path: Path) -> None:
    """A bug in the thread that takes trajectories and serves weights: the trainer, which would wait for groups that
    cannot come, raises what the thread died of at its next look at the run."""

    def tick() -> None:
        raise KeyError("no such record")

    feed = BareFeed(0, 1)
    with Server(f"ipc://{tmp_path}/main", {}, tick=tick) as server:
        feed._streams = [SimpleNamespace(check=server.check)]  # type: ignore[list-item]
        wait_for(lambda: server.failure is not None, "the end of the thread")
        with pytest.raises(MgrpoError, match=r"ipc://.*main.*KeyError: 'no such record'"):
            feed.check_stop()
