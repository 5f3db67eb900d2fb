"""A worker's event loop: what it runs ends when the run does, or when the process is told to leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from mgrpo.errors import DeadlineError
from mgrpo.pipeline import worker_loop as module
from mgrpo.pipeline.worker_loop import Shutdown, WorkerLoop


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "ASK_SECONDS", 0.01)


def playing(running: Callable[[], bool], begun: Callable[[WorkerLoop], None]) -> list[str]:
    """What becomes of work that waits for ever; `begun` is called once it does."""
    heard: list[str] = []

    async def work() -> None:
        begun(loop)
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 60)
        finally:
            heard.append("cancelled")

    async def last() -> None:
        heard.append("last")

    loop = WorkerLoop(running)
    try:
        loop.run(work())
    except Shutdown:
        heard.append("over")
    finally:
        loop.close(last())
    return heard


def test_work_is_cancelled_when_the_process_is_told_to_leave() -> None:
    """The mark is enough; the loop still runs the last word of the engines."""
    assert playing(lambda: True, lambda loop: loop.stop()) == ["cancelled", "over", "last"]


def test_work_is_cancelled_when_the_run_ends() -> None:
    """The store is asked while rollouts are played, and need not answer each time."""
    asked = 0

    def running() -> bool:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise DeadlineError("no answer")
        return asked < 3

    assert playing(running, lambda loop: None) == ["cancelled", "over", "last"]
    assert asked == 3


def test_results_and_errors_pass() -> None:
    """Work that ends is not touched, nor is a thread of the process left behind."""

    async def value() -> int:
        return 7

    async def error() -> None:
        raise KeyError("x")

    loop = WorkerLoop(lambda: True)
    try:
        assert loop.run(value()) == 7
        with pytest.raises(KeyError):
            loop.run(error())
        loop.check()
        loop.stop()
        for call in (loop.check, loop.check_stop, lambda: loop.run(value())):
            with pytest.raises(Shutdown):
                call()
    finally:
        loop.close()
    assert not [thread for thread in threading.enumerate() if "asyncio" in thread.name]
