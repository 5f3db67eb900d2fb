"""`mgrpo monitor`: begins a run whose parts were started one by one, and writes what `mgrpo train` does."""

from __future__ import annotations

import time
from pathlib import Path

from mgrpo.errors import DeadlineError, MgrpoError, StartValidationError
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.interrupts import Interrupts
from mgrpo.run.monitor import Monitor, Outcome
from mgrpo.run.progress import Display

LOOK_SECONDS = 1.0


def follow(root: Path) -> None:
    """Until the run is over; raises its error, or DeadlineError when the store is silent for store.idle_timeout."""
    config = recorded_run(root)
    outcome = Outcome.INTERRUPTED
    with Interrupts() as interrupts, Display() as display:
        monitor = Monitor(config, RunFolder(root), display)
        try:
            # The store may be waiting for a place in a queue.
            monitor.connect(interrupts.check, config.store.idle_timeout)
            while (outcome := monitor.poll()) is Outcome.RUNNING:
                interrupts.check()
                silent = time.monotonic() - monitor.answered
                if silent > config.store.idle_timeout:
                    raise DeadlineError(f"store at {config.store.url}: no answer for {silent:.0f} s")
                time.sleep(LOOK_SECONDS)
            monitor.poll()  # what they said last
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED
        except MgrpoError as error:
            outcome, monitor.reason = Outcome.FAILED, str(error)
            raise
        finally:
            monitor.close(outcome)
    if outcome is Outcome.INTERRUPTED:
        raise KeyboardInterrupt
    if outcome is Outcome.INVALID:
        raise StartValidationError(monitor.reason)
    if outcome is Outcome.FAILED:
        raise MgrpoError(monitor.reason)
