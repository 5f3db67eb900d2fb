"""The breaker of one service: it opens when the service is down, and while it is open calls wait instead of failing.

    closed --(`threshold` failures in a row)--> open --(an answer to a probe)--> closed
                                                 |
                                                 +--(longer than max_outage)--> ServiceError, for good

It opens also where a request is about to fail for good and no other was answered since its failure before. While it is
open one waiting call after the other is let through as a probe, after pauses that double; one that fails goes to the
end of the queue, so that a request which can never be answered is not the only one that is tried. Attempts that fail
meanwhile are the outage's and not spent. Waiting stops the clocks of the rollout (outage.py).

Failures in a row may also be one request's own (a page that its reader cannot load): the client therefore repeats, with
each probe that failed, the last request that was answered. An answer to that closes the breaker, and what fails then
spends its attempts until the next outage begins: fewer each time, so that it ends (client.py). An outage is measured
while somebody waits for its end: a service that nobody asks is not down.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque

from mgrpo.errors import ServiceError
from mgrpo.services import outage
from mgrpo.services.counters import Counters

log = logging.getLogger("mgrpo.services")
LONGEST_PROBE_PAUSE = 30.0  # seconds
FIRST_PROBE_PAUSE = 0.05  # seconds, where the service has no backoff


class Breaker:
    """Use from one event loop."""

    def __init__(
        self,
        name: str,
        url: str,
        counters: Counters,
        *,
        threshold: int,
        backoff: float,
        max_outage: float,
        noise: random.Random,
    ) -> None:
        """threshold: failures in a row that open it. backoff, max_outage: seconds."""
        self._name, self._url, self._counters, self._noise = name, url, counters, noise
        self._threshold, self._backoff, self._max_outage = threshold, backoff, max_outage
        self._row = 0  # failures since the last answer
        self._last = ""  # the words of the last of them
        self._queue: deque[asyncio.Future[bool]] = (
            deque()
        )  # calls that wait; True lets one through as the probe
        self._open = False
        self._since = 0.0  # loop time of its beginning, moved on by the time in which nobody waited
        self._since_clock = 0.0  # the same on time.monotonic(), for other threads
        self._pause = 0.0  # seconds before the next probe
        self._timer: asyncio.TimerHandle | None = None
        self._due_since: float | None = (
            None  # a probe has been due since then, and nobody was there to make it
        )
        self._probing = False
        self._over: str | None = None  # the words of the end

    @property
    def is_open(self) -> bool:
        return self._open

    async def admit(self) -> bool:
        """Return when a call may go out; True: as the probe, which ends with answered(), failed() or abandon(). Raises
        ServiceError once the service was down for longer than max_outage."""
        if not self._open:
            return False
        if self._over is not None:
            raise ServiceError(self._over)
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._due_since is not None:
            self._move(began - self._due_since)
            self._due_since, self._probing = None, True
            return True
        turn: asyncio.Future[bool] = loop.create_future()
        self._queue.append(turn)
        try:
            with outage.waiting():
                return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None and turn.result():
                self.abandon()  # it was let through and cancelled in the same turn of the loop
            elif turn in self._queue:
                self._queue.remove(turn)
            raise
        finally:
            self._counters.waited += loop.time() - began

    def answered(self) -> None:
        """A request was answered: the service is up."""
        self._row, self._probing = 0, False
        if not self._open or self._over is not None:
            return
        seconds = asyncio.get_running_loop().time() - self._since
        log.warning("service %s at %s answers again after %.1f s", self._name, self._url, seconds)
        self._open = False
        outage.end(self)
        self._cancel_timer()
        self._due_since = None
        while self._queue:
            self._let_through(self._queue.popleft(), False)

    def failed(
        self, words: str, *, is_probe: bool, suspects: bool = False, retry_after: float | None = None
    ) -> bool:
        """An attempt failed. Returns whether that was the outage's doing, which spends no attempt of the request.
        suspects: open in any case: it was a request's last attempt, and nothing says that the service is up.
        retry_after: seconds for which the service asked not to be asked."""
        self._row, self._last = self._row + 1, words
        if self._open:
            if is_probe:
                self._probing = False
                self._after_a_probe(retry_after)
            return True
        if self._row < self._threshold and not suspects:
            return False
        now = asyncio.get_running_loop().time()
        self._open, self._since, self._since_clock = True, now, time.monotonic()
        self._pause = max(self._backoff, FIRST_PROBE_PAUSE)
        self._counters.outages += 1
        outage.begin(self, self._describe)
        log.warning("service %s at %s is down, its calls wait: %s", self._name, self._url, words)
        self._schedule(retry_after)
        return True

    def abandon(self) -> None:
        """The probe ended without a word about the service, e.g. its rollout was cancelled. Idempotent."""
        if self._probing:
            self._probing = False
            self._probe()

    def close(self) -> None:
        """Nobody waits any more. Idempotent."""
        self._cancel_timer()
        outage.end(self)

    # -- probes --------------------------------------------------------------------------------------------------------

    def _after_a_probe(self, retry_after: float | None) -> None:
        down = asyncio.get_running_loop().time() - self._since
        if down >= self._max_outage:
            self._over = (
                f"service {self._name!r} at {self._url} was down for {down:.1f} s, longer than max_outage = "
                f"{self._max_outage:g} s, the last request with: {self._last}"
            )
            outage.end(self)
            while self._queue:
                if not (turn := self._queue.popleft()).done():
                    turn.set_exception(ServiceError(self._over))
            return
        self._pause = min(2 * self._pause, LONGEST_PROBE_PAUSE)
        self._schedule(retry_after)

    def _schedule(self, retry_after: float | None) -> None:
        """The next probe: after the pause, or what the service asked for, but not after the outage's end."""
        loop = asyncio.get_running_loop()
        pause = max(self._pause * (0.5 + self._noise.random()), retry_after or 0.0)
        end = self._since + self._max_outage
        self._cancel_timer()
        self._timer = loop.call_at(min(loop.time() + pause, max(end, loop.time())), self._probe)

    def _probe(self) -> None:
        """Let the call through that waits longest; the next that comes, where none does."""
        self._timer = None
        if not self._open or self._over is not None:
            return
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                self._probing = True
                self._let_through(turn, True)
                return
        self._due_since = asyncio.get_running_loop().time()

    @staticmethod
    def _let_through(turn: asyncio.Future[bool], as_probe: bool) -> None:
        if not turn.done():
            turn.set_result(as_probe)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _move(self, seconds: float) -> None:
        self._since += seconds
        self._since_clock += seconds

    def _describe(self) -> str:
        """For people; from any thread."""
        calls = len(self._queue) + self._probing
        if not calls:
            return ""
        seconds = time.monotonic() - self._since_clock
        return (
            f"waiting for service {self._name} at {self._url}, which has been down for {seconds:.0f} s "
            f"({self._last}): {calls} calls wait"
        )
