"""When in-process engines compute: not before every coroutine that can run has had its turn.

Rollouts are coroutines of one event loop. A step that ran as soon as the first of them asked would run with a
batch of one; a step on a timer would make the batch depend on the machine's speed. The stepper lets the loop
turn until several turns in a row bring no request, then steps every engine that has work. With rollouts that
only wait for engines, the batches of a run are a function of its requests, and the same seed gives the same
bits.

Rollouts that wait for tools and judges as well would make them depend on how long those take. Where an engine asks for
it (wait_for_calls), nothing is computed while such a call is under way (mgrpo/services/outside.py). A rollout that
waits for its engine then waits for other rollouts' calls: its clocks stand still meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import ClassVar, Protocol
from weakref import WeakKeyDictionary

from mgrpo.services import outside
from mgrpo.services.outage import Joint

QUIET_TURNS = 4
"""Loop turns without a new request before a step: a result passes tasks and gathers, one turn each."""


class Steppable(Protocol):
    """An engine as the stepper sees it."""

    def requests(self) -> int:
        """Requests that are running or waiting."""
        ...

    def step(self) -> bool:
        """Compute once; True when a request was answered, which lets a coroutine run."""
        ...


class Stepper:
    """Drives all in-process engines of one event loop."""

    _of: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Stepper]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._engines: list[Steppable] = []  # with work, in the order of their first request
        self._arrivals = 0
        self._waits_for_calls = False
        self._joint = Joint()  # the clocks of those whose engines wait for calls
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def running(cls) -> Stepper:
        """The stepper of the running event loop."""
        return cls._of.setdefault(asyncio.get_running_loop(), Stepper())

    def submit(self, engine: Steppable, wait_for_calls: bool = False) -> None:
        """`engine` has a new request."""
        self._arrivals += 1
        self._waits_for_calls = self._waits_for_calls or wait_for_calls
        if engine not in self._engines:
            self._engines.append(engine)
        if self._task is None or self._task.done():
            # A context of its own: it steps for all rollouts and must not end with the one that asked first.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def _run(self) -> None:
        answered = True
        while self._engines:
            await self._settle(QUIET_TURNS if answered else 1)
            answered = False
            for engine in self._engines:
                if engine.requests():
                    answered |= engine.step()
            self._engines = [engine for engine in self._engines if engine.requests()]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a request of an engine that waits for calls."""
        with self._joint.following(), outside.inner_work():
            yield

    async def _settle(self, turns: int) -> None:
        calls = outside.Outside.running()
        quiet = 0
        while quiet < turns or (self._waits_for_calls and calls.under_way()):
            if self._waits_for_calls and calls.under_way():
                self._joint.stop()
                try:
                    await calls.over()
                finally:
                    self._joint.go_on()
                quiet, turns = 0, QUIET_TURNS
            before = self._arrivals
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._arrivals == before else 0
