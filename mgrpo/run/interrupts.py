"""Ctrl-C and SIGTERM as a count that loops look at, so that neither tears anything apart in the middle."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SAME_SECONDS = 0.5  # the terminal and a wrapper such as `uv run` may both send what was one Ctrl-C


class Interrupts:
    """Use as a context manager on the main thread. Both signals count alike, also where a shell started the command in
    the background with SIGINT ignored. The handler takes no lock: a second signal may arrive inside it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._clock, self._last = clock, -SAME_SECONDS
        self._before: dict[signal.Signals, Any] = {}

    def arrived(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = self._clock()
        if now - self._last >= SAME_SECONDS:
            self.count, self._last = self.count + 1, now

    def check(self) -> None:
        """Raise KeyboardInterrupt once a signal has arrived."""
        if self.count:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self.arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
