"""An event loop whose time passes only where it would wait: an outage of a minute takes no time, to the millisecond.

For coroutines that wait for nothing but timers and each other; no threads, no sockets.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.SelectSelector):
    """Waits in no time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and no timer is set"
        self.now += max(0.0, timeout)
        return super().select(0)


class FakeClockLoop(asyncio.SelectorEventLoop):
    """Begins at 0 s."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def run(work: Coroutine[Any, Any, T], seconds: float = 1e5) -> T:
    """The result of `work`, which fails after so many of its seconds."""
    with asyncio.Runner(loop_factory=FakeClockLoop) as runner:
        return runner.run(asyncio.wait_for(work, seconds))


def now() -> float:
    """Of the loop that runs."""
    return asyncio.get_running_loop().time()
