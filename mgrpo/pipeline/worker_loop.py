"""A rollout worker's event loop, which leaves its work when the run ends or the process is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from mgrpo.errors import DeadlineError

LOOK_SECONDS = 0.2  # between two looks at the mark of stop() while something runs
ASK_SECONDS = 1.0  # between two questions to the store, whether the run is still running, meanwhile

T = TypeVar("T")


class Shutdown(Exception):
    """The run was ended, or this process was asked to stop."""


class WorkerLoop:
    """Runs coroutines one after the other on one event loop. running: asks the store whether the run still is."""

    def __init__(self, running: Callable[[], bool]) -> None:
        self._runner = asyncio.Runner()
        self._running = running
        self.stopped = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. When the run ends meanwhile, or stop() is called, `work` is cancelled at its next await
        and Shutdown raised."""
        if self.stopped:
            work.close()
            raise Shutdown
        return self._runner.run(self._while_running(work))

    def stop(self) -> None:
        """Run nothing more. Only a mark, since a handler must not take a lock: a signal handler may call it."""
        self.stopped = True

    def check_stop(self) -> None:
        """Raise Shutdown once stop() was called."""
        if self.stopped:
            raise Shutdown

    def check(self) -> None:
        """Raise Shutdown once stop() was called or the run has ended. Asks the store, and waits for its answer."""
        if self.stopped or not self._running():
            raise Shutdown

    def close(self, last: Coroutine[Any, Any, object] | None = None) -> None:
        """Run `last` to its end, then close the loop. Idempotent without it."""
        try:
            if last is not None:
                self._runner.run(last)
        finally:
            self._runner.close()

    async def _while_running(self, work: Coroutine[Any, Any, T]) -> T:
        working, watching = asyncio.create_task(work), asyncio.create_task(self._watch())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                watching.result()  # raises
            return await working
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _watch(self) -> None:
        """Raises Shutdown. A store that does not answer is reported by those who need it."""
        asked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.check_stop()
            if time.monotonic() - asked >= ASK_SECONDS:
                with contextlib.suppress(DeadlineError):
                    await asyncio.to_thread(self.check)
                asked = time.monotonic()
