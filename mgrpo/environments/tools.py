"""A tool call of a rollout: tried again by itself where a server did not answer, and measured.

A rollout of many calls that is played again for one of them pays for all. Episode.tool() repeats the call alone, after
a pause that doubles each time; only a call that fails to its end fails its attempt at the rollout, which is then played
again as a whole (mgrpo/pipeline/play.py).

Repeated are failures of the way to a tool, not of what it was asked: InfrastructureError, a timeout, a connection that
was refused or broke off, a name or host that could not be reached. Anything else is raised at once, as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import functools
import inspect
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.services import outage, outside

LONGEST_PAUSE = 30.0  # seconds between two attempts at a call
UNREACHABLE = {
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENETRESET, errno.ETIMEDOUT, errno.EADDRNOTAVAIL),
}

_inside: contextvars.ContextVar[str | None] = contextvars.ContextVar("mgrpo_tool", default=None)


@dataclass(slots=True)
class _Calls:
    """Those of one tool in one rollout, all its attempts together."""

    seconds: list[float] = field(default_factory=list)  # of each call, attempts and pauses included
    retries: int = 0
    failures: int = 0  # calls that raised in the end


class ToolCalls:
    """The tool calls of one rollout. Use from one event loop."""

    def __init__(self) -> None:
        self._of: dict[str, _Calls] = {}
        self._begun = 0  # calls

    async def run(
        self,
        name: str,
        call: Callable[[], Any],
        timeout: float | None,
        attempts: int,
        backoff: float,
        noise: Callable[[int], float],
        seen: dict[str, int | float | str],
    ) -> Any:
        """See Episode.tool. noise: a number in [0, 1) that its argument decides. seen: gets what the call's span says
        of it, "retries" and whether it has "failed" (1 or 0)."""
        if not name.isidentifier():
            raise ValueError(f"tool {name!r:.100}: expected a name of letters, digits and _")
        if attempts < 1 or backoff < 0 or not (timeout is None or timeout > 0):
            raise ValueError(
                f"tool {name!r}: attempts {attempts} must be >= 1, timeout {timeout} > 0, backoff {backoff} >= 0"
            )
        calls, began = self._of.setdefault(name, _Calls()), time.monotonic()
        self._begun += 1
        salt, failed = self._begun << 8, True
        try:
            for attempt in range(attempts):
                if attempt:
                    calls.retries += 1
                    seen["retries"] = attempt
                    pause = backoff * 2.0 ** (attempt - 1) * (0.5 + noise(salt | attempt & 0xFF))
                    with outside.call():
                        await asyncio.sleep(min(pause, LONGEST_PAUSE))
                try:
                    with outside.call():
                        result = await _once(name, call, timeout)
                    failed = False
                    return result
                except Exception as error:
                    if not passes(error):
                        raise
                    last = error
            tried = f"in {attempts} attempts, the last with" if attempts > 1 else "with"
            raise InfrastructureError(f"tool {name!r} failed {tried}: {_words(last)}") from last
        except asyncio.CancelledError:
            failed = False  # the rollout's end, not the tool's doing
            raise
        finally:
            calls.seconds.append(time.monotonic() - began)
            calls.failures += failed
            seen["failed"] = int(failed)

    def metrics(self) -> dict[str, list[float]]:
        """Full name -> values: seconds has one of each call, the others are counts of the rollout."""
        found: dict[str, list[float]] = {}
        for name, calls in self._of.items():
            found[f"rollout/tool/{name}/seconds"] = list(calls.seconds)
            found[f"rollout/tool/{name}/calls"] = [float(len(calls.seconds))]
            found[f"rollout/tool/{name}/retries"] = [float(calls.retries)]
            found[f"rollout/tool/{name}/failures"] = [float(calls.failures)]
        return {name: values for name, values in found.items() if values}


def outside_tools(what: str) -> None:
    """Raise ValueError within a tool call: what an agent has sampled there could not be taken back for a retry."""
    if (name := _inside.get()) is not None:
        raise ValueError(
            f"{what} within tool {name!r}, which may be tried again; let agents speak outside of it"
        )


def passes(error: BaseException) -> bool:
    """The way to a tool failed, and may work the next time."""
    if isinstance(error, BaseExceptionGroup):
        leaves = list(_leaves(error))
        return any(map(passes, leaves)) and not any(isinstance(e, ConfigError | MemoryError) for e in leaves)
    if isinstance(error, InfrastructureError | ConnectionError | TimeoutError | socket.gaierror):
        return True
    reason = getattr(error, "reason", None)  # of urllib's URLError, which is an OSError without a number
    if isinstance(error, OSError) and isinstance(reason, OSError):
        return passes(reason)
    return isinstance(error, OSError) and error.errno in UNREACHABLE


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, InfrastructureError) else f"{type(error).__name__}: {error}"


async def _once(name: str, call: Callable[[], Any], timeout: float | None) -> Any:
    token = _inside.set(name)
    try:
        async with outage.timeout(timeout) as bound:
            result = await call() if _is_async(call) else await in_thread(f"tool {name}", call)
            return await result if inspect.isawaitable(result) else result
    except TimeoutError as error:
        if bound.expired():
            raise InfrastructureError(f"no answer within {timeout:g} s") from error
        raise
    finally:
        _inside.reset(token)


def _is_async(call: Callable[..., Any]) -> bool:
    while isinstance(call, functools.partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


def in_thread(name: str, call: Callable[[], Any]) -> Awaitable[Any]:
    """What call() returns. name: of its thread. Each call has one of its own: asyncio's pool has a few for all
    rollouts, and a tool that hangs would keep the process from ending."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(call)
        except StopIteration as stop:  # which no future can hold
            error = RuntimeError(f"{type(stop).__name__}: {stop}")
        except BaseException as other:
            error = other
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
