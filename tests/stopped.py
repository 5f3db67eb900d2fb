"""A process that stands still: SIGSTOP, awaited."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

SECONDS = 30.0


def stand_still(pid: int) -> None:
    """Stop a process and wait until all its threads have stopped: kill() returns before they have, and one that runs on
    another core may still answer."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + SECONDS
    while not stands_still(pid):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.005)


def stands_still(pid: int) -> bool:
    """Whether a process, with all its threads, has been stopped by a signal."""
    return all(map(_stopped, Path(f"/proc/{pid}/task").glob("*/stat")))


def _stopped(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "TZX"
    except FileNotFoundError:  # a thread that has ended
        return True
