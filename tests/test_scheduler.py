"""When engines step: not before every coroutine that can run has asked."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from mgrpo.engines.hf.scheduler import Stepper
from mgrpo.services import outage, outside
from tests import fake_clock


class Counter:
    """An engine that answers all its requests in one step and keeps the size of each batch."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.batches: list[int] = []

    async def ask(self, wait_for_calls: bool = False) -> None:
        future, stepper = asyncio.get_running_loop().create_future(), Stepper.running()
        self.waiting.append(future)
        stepper.submit(self, wait_for_calls)
        with stepper.waiting() if wait_for_calls else contextlib.nullcontext():
            await future

    def requests(self) -> int:
        return len(self.waiting)

    def step(self) -> bool:
        self.batches.append(len(self.waiting))
        for future in self.waiting:
            future.set_result(None)
        self.waiting = []
        return True


def test_rollouts_behind_tasks_and_gathers_share_their_batches():
    """Twenty rollouts that delegate through tasks and gathers meet in full batches, turn after turn."""
    main, sub = Counter(), Counter()

    async def delegate() -> None:
        await asyncio.gather(*[asyncio.create_task(sub.ask()) for _ in range(2)])

    async def rollout() -> None:
        for _ in range(3):
            await main.ask()
            await asyncio.create_task(delegate())
        await main.ask()

    async def run() -> None:
        await asyncio.wait_for(asyncio.gather(*[rollout() for _ in range(20)]), 10)

    asyncio.run(run())
    assert main.batches == [20] * 4
    assert sub.batches == [40] * 3


def test_an_idle_stepper_ends_and_starts_again():
    """No task stays behind when the work is done, and a later request finds a stepper at work."""
    engine = Counter()

    async def run() -> None:
        for _ in range(3):
            await asyncio.wait_for(engine.ask(), 10)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert engine.batches == [1, 1, 1]


@pytest.mark.parametrize("waits", [True, False])
def test_batches_do_not_depend_on_how_long_calls_take(waits: bool) -> None:
    """Rollouts whose calls take from nothing to seconds meet in full batches all the same; without it they do not."""
    engine = Counter()

    async def call(seconds: float) -> None:
        with outside.call():
            for _ in range(2):  # an attempt, and another
                with outside.call():
                    await asyncio.sleep(seconds)

    async def rollout(number: int) -> None:
        for turn in range(3):
            await engine.ask(waits)
            await asyncio.gather(*(asyncio.create_task(call(number * turn)) for _ in range(2)))
        await engine.ask(waits)

    async def run() -> None:
        await asyncio.gather(*[rollout(number) for number in range(5)])

    fake_clock.run(run())
    assert (engine.batches == [5] * 4) is waits and sum(engine.batches) == 20


def test_an_engine_does_not_wait_for_a_call_that_waits_for_it() -> None:
    """A call that asks an engine itself ends; the engine waits for it again once it goes on without."""
    engine = Counter()

    async def call() -> None:
        with outside.call():
            await asyncio.gather(engine.ask(True), engine.ask(True))
            await asyncio.sleep(5.0)

    async def run() -> float:
        began = fake_clock.now()
        await asyncio.wait_for(asyncio.gather(call(), engine.ask(True)), 60.0)
        await asyncio.wait_for(engine.ask(True), 1.0)
        return fake_clock.now() - began

    assert fake_clock.run(run()) == 5.0 and engine.batches == [3, 1]


def test_clocks_stand_still_while_others_calls_are_waited_for() -> None:
    """A call of 20 s costs its own rollout, whose deadline passes; the other, which waits for the engine, has all of
    its time left."""
    engine = Counter()

    async def slow() -> None:
        async with outage.timeout(10.0):
            await engine.ask(True)
            with outside.call():
                await asyncio.sleep(20.0)

    async def other() -> float:
        async with outage.timeout(3.0) as clock:
            for _ in range(3):
                await engine.ask(True)
                await asyncio.sleep(0.5)
            return clock.paused()

    async def run() -> list[object]:
        return await asyncio.gather(slow(), other(), return_exceptions=True)

    late, paused = fake_clock.run(run())
    assert isinstance(late, TimeoutError) and paused == pytest.approx(9.5)
