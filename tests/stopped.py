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
    while not all(map(_stopped, Path(f"/proc/{pid}/task").glob("*/stat"))):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.005)


def _stopped(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "TZX"
    except FileNotFoundError:  # a thread that has ended
        return True
