"""`mgrpo monitor`: begins a run whose parts were started one by one, and writes what `mgrpo train` does."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from mgrpo.cli.monitor import Monitor, Outcome
from mgrpo.cli.parts import RunFolder, recorded_run
from mgrpo.cli.progress import Display
from mgrpo.errors import DeadlineError, GateError, MgrpoError

START_SECONDS = 600.0  # the store may be waiting for a place in a queue
LOOK_SECONDS = 1.0


def follow(root: Path) -> None:
    """Until the run is over; raises its error, or DeadlineError when the store is silent for store.idle_timeout."""
    config = recorded_run(root)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # write the summary, then leave
    outcome = Outcome.INTERRUPTED
    with Display() as display:
        monitor = Monitor(config, RunFolder(root), display)
        try:
            monitor.connect(lambda: None, START_SECONDS)
            while (outcome := monitor.poll()) is Outcome.RUNNING:
                silent = time.monotonic() - monitor.answered
                if silent > config.store.idle_timeout:
                    raise DeadlineError(f"store at {config.store.url}: no answer for {silent:.0f} s")
                time.sleep(LOOK_SECONDS)
            monitor.poll()  # what they said last
        finally:
            monitor.close(outcome)
    if outcome is Outcome.INVALID:
        raise GateError(monitor.reason)
    if outcome is Outcome.FAILED:
        raise MgrpoError(monitor.reason)
