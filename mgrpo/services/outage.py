"""Time that a rollout spends waiting for a service that is down is not the rollout's: its clocks stand still.

    async with timeout(deadline) as limit:      # like asyncio.timeout, but it does not run during an outage
        ...
            with waiting():                     # a breaker, around its wait for the service (breaker.py)
                ...

Which clocks stand still follows from the context: those of the timeout() blocks around the call, in whichever asyncio
task of theirs. Several calls of one rollout may wait at once, and the time counts once. A call that waits for the same
call of another rollout (cassette.py) is joined to it: whatever stops the one's clocks stops the other's too.

The process as a whole lists its outages (`outages()`), so that a rollout worker can report that it waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Protocol


class Clock(Protocol):
    """Something that is not to run while a call waits for a service that is down. Calls of the two come in pairs."""

    def stop(self) -> None: ...

    def go_on(self) -> None: ...


_clocks: ContextVar[tuple[Clock, ...]] = ContextVar("mgrpo_clocks", default=())


class timeout:
    """An asynchronous context manager like asyncio.timeout(seconds), raising TimeoutError; seconds None: no bound, but
    the outages within are measured all the same."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._depth = 0  # calls that wait
        self._since = 0.0  # when the first of them began to
        self._paused = 0.0  # seconds of the waits that are over
        self._left: float | None = None  # of the bound, while it stands still
        self._inside = False

    async def __aenter__(self) -> timeout:
        self._loop = asyncio.get_running_loop()
        self._bound = asyncio.timeout(self._seconds)
        await self._bound.__aenter__()
        self._inside = True
        self._token: Token[tuple[Clock, ...]] = _clocks.set((*_clocks.get(), self))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _clocks.reset(self._token)
        self._inside = False
        await self._bound.__aexit__(kind, error, trace)

    def expired(self) -> bool:
        """Whether the bound has passed."""
        return self._bound.expired()

    def paused(self) -> float:
        """Seconds so far in which at least one call within waited for a service that is down."""
        running = self._loop.time() - self._since if self._depth else 0.0
        return self._paused + running

    def stop(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._since = self._loop.time()
        when = self._bound.when() if self._is_running() else None
        if when is not None and when > self._since:
            self._left = when - self._since
            self._bound.reschedule(None)

    def go_on(self) -> None:
        self._depth -= 1
        if self._depth:
            return
        now = self._loop.time()
        self._paused += now - self._since
        if self._left is not None and self._is_running():
            self._bound.reschedule(now + self._left)
        self._left = None

    def _is_running(self) -> bool:
        return self._inside and not self._bound.expired()


class Joint:
    """The clocks of everyone who waits for one call that somebody else makes."""

    def __init__(self) -> None:
        self._depth = 0
        self._members: dict[object, tuple[Clock, ...]] = {}

    def stop(self) -> None:
        self._depth += 1
        if self._depth == 1:
            for clocks in self._members.values():
                _stop(clocks)

    def go_on(self) -> None:
        self._depth -= 1
        if not self._depth:
            for clocks in self._members.values():
                _go_on(clocks)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around the call itself."""
        token = _clocks.set((*_clocks.get(), self))
        try:
            yield
        finally:
            _clocks.reset(token)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Around the wait for its result."""
        clocks, member = _clocks.get(), object()
        self._members[member] = clocks
        if self._depth:
            _stop(clocks)
        try:
            yield
        finally:
            if self._depth:
                _go_on(clocks)
            del self._members[member]


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for a service that is down."""
    clocks = _clocks.get()
    _stop(clocks)
    try:
        yield
    finally:
        _go_on(clocks)


def paused_seconds() -> float:
    """Seconds that the current rollout has spent waiting for services that were down; 0 outside of one."""
    outermost = next((clock for clock in _clocks.get() if isinstance(clock, timeout)), None)
    return 0.0 if outermost is None else outermost.paused()


def _stop(clocks: tuple[Clock, ...]) -> None:
    for clock in clocks:
        clock.stop()


def _go_on(clocks: tuple[Clock, ...]) -> None:
    for clock in clocks:
        clock.go_on()


_outages: dict[object, Callable[[], str]] = {}


def begin(service: object, words: Callable[[], str]) -> None:
    """`service` (any object that stands for it) is down. words: of it now, "" while no call waits for it; from any
    thread."""
    _outages[service] = words


def end(service: object) -> None:
    """It is not down any more. Idempotent."""
    _outages.pop(service, None)


def outages() -> list[str]:
    """One sentence for each service of this process that is down and that calls wait for. Any thread may ask."""
    return [text for words in list(_outages.values()) if (text := words())]
