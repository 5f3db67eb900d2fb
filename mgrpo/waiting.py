"""One wait with a deadline, instead of a loop of its own at every place that waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

from mgrpo.errors import DeadlineError

T = TypeVar("T")
FIRST_PAUSE = 0.001  # seconds; pauses double from here


def wait_until(
    ready: Callable[[], T | Literal[False] | None],
    seconds: float,
    late: Callable[[], str],
    *,
    progress: Callable[[], object] = lambda: None,
    pause: float = 0.05,
    error: type[Exception] = DeadlineError,
) -> T:
    """Call `ready` until it gives something other than None or False, and return that.

    Raises `error` with the text of late(), which should name peer, step and queue, once `seconds` have passed since the
    start or since progress() last gave another value; `ready` is called once more after the deadline. What `ready`
    raises ends the wait. pause: longest seconds between two calls.
    """
    since, seen, nap = time.monotonic(), progress(), min(FIRST_PAUSE, pause)
    while True:
        passed = time.monotonic() - since > seconds  # before the call: what came in time is never refused
        found = ready()
        if found is not None and found is not False:
            return found
        if (value := progress()) != seen:
            since, seen = time.monotonic(), value
        elif passed:
            raise error(late())
        time.sleep(nap)
        nap = min(2 * nap, pause)
