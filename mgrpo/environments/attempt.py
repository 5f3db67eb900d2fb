"""One attempt at a rollout owns the tasks that it starts: none of them outlives it.

    attempt = Attempt()
    try:
        with attempt:                # asyncio.create_task, gather, TaskGroup ... inside belong to it, at any depth
            await task.play(question, episode)
    finally:
        await attempt.end()          # what still runs is cancelled and awaited

asyncio.gather raises at its first failure and leaves the other tasks running. They would go on calling the engines
while the rollout is played again, so they end before that begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, Token
from typing import Any, cast

from mgrpo.errors import InfrastructureError

PATIENCE = 60.0  # seconds that a cancelled task may take to end

_owner: ContextVar[Attempt | None] = ContextVar("mgrpo_attempt", default=None)


class AttemptOverError(asyncio.CancelledError):
    """A task goes on sampling for an attempt that has ended. A CancelledError, so that `except Exception` in a task's
    code does not keep it alive."""


class Attempt:
    """Use as a context manager around the code whose tasks it is to own, then await end(). A task that is to outlive
    the rollout is created with a context of its own: create_task(..., context=contextvars.Context())."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], asyncio.Task[Any] | None] = {}  # running, with who created them
        self._cancelled: set[asyncio.Task[Any]] = set()
        self._over = False
        self._token: Token[Attempt | None] | None = None

    def __enter__(self) -> Attempt:
        loop = asyncio.get_running_loop()
        factory = loop.get_task_factory()
        if not isinstance(factory, _OwningFactory):
            loop.set_task_factory(cast(Any, _OwningFactory(factory)))  # its type is private to asyncio
        self._token = _owner.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _owner.reset(self._token)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """`task` was created by this attempt's code."""
        self._tasks[task] = asyncio.current_task()
        task.add_done_callback(self._forget)
        if self._over:
            self._cancel(task)

    async def end(self) -> None:
        """Cancel every task and wait for it. Raises InfrastructureError when none has ended within PATIENCE seconds."""
        self._over = True
        while running := list(self._tasks):
            # Those first that no other of them created: a gather or TaskGroup cancels its own, and a second time
            # would interrupt their tidying up.
            for task in [task for task, by in self._tasks.items() if by not in self._tasks]:
                self._cancel(task)
            ended, left = await asyncio.wait(running, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                self._forget(task)
            if not ended:
                for task in left:
                    self._cancel(task)
                names = ", ".join(sorted(str(task.get_coro()) for task in left))
                raise InfrastructureError(
                    f"{len(left)} tasks of an attempt did not end within {PATIENCE:g} s of their cancellation: "
                    f"{names:.300}"
                )

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if self._over and not task.cancelled():
            task.exception()  # retrieved: the attempt's own error is the one that is reported

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        if task not in self._cancelled:
            self._cancelled.add(task)
            task.cancel("the attempt at this rollout has ended")


class _OwningFactory:
    """A loop's task factory that registers with an attempt the tasks that its code creates."""

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self._before = before

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> Any:
        context = options.get("context")
        owner = _owner.get() if context is None else context.get(_owner)
        if self._before is None:
            task = asyncio.Task(coro, loop=loop, **options)
        else:
            task = self._before(loop, coro, **options)
        if owner is not None:
            owner.adopt(task)
        return task
