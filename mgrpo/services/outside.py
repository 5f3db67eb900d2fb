"""Calls to the world outside that are under way: tools, judges and services, whose answers take real time.

What is sampled in one batch decides the last bits of log-probs. An engine that computes while a call is under way has a
batch that depends on how long the call takes; one that waits for over() has batches that follow from the rollouts alone
(mgrpo/engines/hf/scheduler.py), so a run whose answers were recorded is the same run when they are there at once.

    with call():             # around a call, by whoever makes it; calls may lie in each other
        ...
    with inner_work():       # around work within a call that engines do: they must not wait for that call
        ...
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar
from weakref import WeakKeyDictionary


class _Call:
    """One that is under way. inner: engines' work within it."""

    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = 0


_mine: ContextVar[tuple[_Call, ...]] = ContextVar("mgrpo_outside", default=())


class Outside:
    """The calls of one event loop."""

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Outside]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.calls: set[_Call] = set()
        self._waiting: list[asyncio.Future[None]] = []

    @classmethod
    def running(cls) -> Outside:
        """That of the running event loop."""
        return cls._of.setdefault(asyncio.get_running_loop(), Outside())

    def under_way(self) -> bool:
        """Whether a call is, in which no engine works."""
        return any(not call.inner for call in self.calls)

    async def over(self) -> None:
        """Return once none is under way. Has no bound of its own: calls have (timeouts, max_outage, deadlines)."""
        while self.under_way():
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def changed(self) -> None:
        """Wake who waits, where nothing is left to wait for."""
        if self._waiting and not self.under_way():
            for future in self._waiting:
                if not future.done():
                    future.set_result(None)
            self._waiting.clear()


@contextmanager
def call() -> Iterator[None]:
    """Around a call; see the module's docstring."""
    outside, mine = Outside.running(), _Call()
    outside.calls.add(mine)
    token = _mine.set((*_mine.get(), mine))
    try:
        yield
    finally:
        _mine.reset(token)
        outside.calls.discard(mine)
        outside.changed()


@contextmanager
def inner_work() -> Iterator[None]:
    """Around what an engine does for a call; see the module's docstring."""
    mine = _mine.get()
    for one in mine:
        one.inner += 1
    if mine:
        Outside.running().changed()
    try:
        yield
    finally:
        for one in mine:
            one.inner -= 1
