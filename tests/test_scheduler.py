"""When engines step: not before every coroutine that can run has asked."""

from __future__ import annotations

import asyncio

from mgrpo.engines.hf.scheduler import Stepper


class Counter:
    """An engine that answers all its requests in one step and keeps the size of each batch."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.batches: list[int] = []

    async def ask(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        Stepper.running().submit(self)
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
