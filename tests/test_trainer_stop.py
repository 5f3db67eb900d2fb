"""A trainer that is told to stop: what it does depends on what it has to save. And one that nobody can reach."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mgrpo.errors import DeadlineError, MgrpoError
from mgrpo.pipeline.trainer_loop import Shutdown, TrainerLoop
from mgrpo.transport.server import Server
from tests.runs import wait_for


class Bare(TrainerLoop):
    """A trainer without processes around it: its stages are written down, the first claim of `stop_at` stops it."""

    def __init__(self, begun: int, stop_at: int) -> None:
        self.events: list[str] = []
        self._stop_requested = False
        self._streams = []
        self._step = self._begun = self._checkpointed = begun
        self._stop_at = stop_at
        self._role, self._folder, self._task = "main", Path(), SimpleNamespace(chat=False)  # type: ignore[assignment]
        engine = SimpleNamespace(direct=False)
        self._agent = SimpleNamespace(frozen=False, model="folder", engine=engine)  # type: ignore[assignment]
        self._trainer = SimpleNamespace(  # type: ignore[assignment]
            load=lambda start: SimpleNamespace(step=begun, passed_over=()) if begun else None,
            policy_files=dict,
            heartbeat=lambda: None,
            save=lambda step: self.events.append(f"checkpoint {step}"),
            saved=self.settle,
            close=lambda: self.events.append("end"),
            note_cursors=lambda checkpoint, cursors: cursors,
        )
        self._ahead = SimpleNamespace(stop=lambda: None)  # type: ignore[assignment]
        self._reporter = SimpleNamespace(flush=lambda: None)  # type: ignore[assignment]
        self._weights = SimpleNamespace(describe=lambda files: None)  # type: ignore[assignment]

    def settle(self, wait: bool) -> object:
        self.events.append("durable")
        return None

    def _publish(self, version: int) -> None:
        pass

    def _report(self, kind: str, payload: dict[str, object]) -> None:
        pass

    def _train(self) -> None:
        while True:
            if self._step == self._stop_at:
                self._on_signal(signal.SIGTERM, None)
                self._check_stop()
            self._step += 1


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
        (0, 7, ["durable", "checkpoint 7", "durable", "end"]),
        (5, 6, ["durable", "checkpoint 6", "durable", "end"]),
        (5, 5, ["durable", "end"]),  # nothing since the last one
    ],
)
def test_a_stop_while_waiting_saves_the_last_step(begun: int, stop_at: int, events: list[str]) -> None:
    """Wherever the loop is when the stop is noticed: the steps since the last checkpoint are saved before it leaves."""
    trainer = Bare(begun, stop_at)
    trainer._streams = [stream(commit=lambda step: 0)]  # type: ignore[list-item]
    trainer.run()
    assert trainer.events == events


def test_a_store_that_has_ended_too_costs_no_checkpoint() -> None:
    """The launcher was killed, say: the commit of an earlier checkpoint gets no answer, and the last step is saved all
    the same. While the run goes on the same silence is an error."""

    def silent(step: int) -> int:
        raise DeadlineError("store at ipc:///x: no answer to commit within 5 s")

    trainer = Bare(0, 7)
    trainer.settle = lambda wait: SimpleNamespace(step=5)  # type: ignore[method-assign]
    trainer._trainer.saved = trainer.settle  # type: ignore[method-assign]
    trainer._streams = [stream(commit=silent)]  # type: ignore[list-item]
    trainer.run()
    assert trainer.events == ["checkpoint 7", "end"]
    trainer._stop_requested = False
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
    trainer = Bare(0, 1)
    signal.signal(signal.SIGINT, trainer._on_signal)
    trainer._on_signal(signal.SIGINT, None)
    assert trainer._stop_requested and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    with pytest.raises(Shutdown):
        trainer._check_stop()


def test_a_trainer_whose_address_is_served_no_more_ends(tmp_path: Path) -> None:
    """A bug in the thread that takes trajectories and serves weights: the trainer, which would wait for groups that
    cannot come, raises what the thread died of at its next look at the run."""

    def tick() -> None:
        raise KeyError("no such record")

    trainer = Bare(0, 1)
    with Server(f"ipc://{tmp_path}/main", {}, tick=tick) as server:
        trainer._streams = [SimpleNamespace(check=server.check)]  # type: ignore[list-item]
        wait_for(lambda: server.failure is not None, "the end of the thread")
        with pytest.raises(MgrpoError, match=r"ipc://.*main.*KeyError: 'no such record'"):
            trainer._check_stop()
