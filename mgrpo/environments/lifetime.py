"""A task's first and last word on the loop that plays it: Task.preflight() and Task.close()."""

from __future__ import annotations

import asyncio
import logging

from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.plugins import errors_named

log = logging.getLogger("mgrpo.environments")

CLOSE_SECONDS = 10.0


async def preflight(task: Task, name: str, limit: float) -> None:
    """Ask the task whether it can be played. name: what people call it. limit: seconds it may take
    (store.idle_timeout). Raises ConfigError in the task's words where it cannot, with file and line where its code
    raised something else than an error of mgrpo's."""
    where = f"preflight of task {name!r}"
    try:
        with errors_named(where):
            async with asyncio.timeout(limit) as bound:
                await task.preflight()
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, TimeoutError) and bound.expired():
            raise ConfigError(f"{where} had not ended after {limit:g} s (store.idle_timeout)") from None
        if isinstance(cause, MgrpoError) and not isinstance(error, type(cause)):
            raise ConfigError(f"{where}: {cause}") from None
        raise


async def close_task(task: Task, seconds: float = CLOSE_SECONDS) -> None:
    """Let the task close what it holds. What goes wrong is a warning: the work is done."""
    try:
        async with asyncio.timeout(seconds):
            await task.close()
    except Exception as error:
        log.warning("%s.close() failed: %s: %s", type(task).__name__, type(error).__name__, error)
