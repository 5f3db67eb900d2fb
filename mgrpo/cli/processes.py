"""The processes of a run on this machine: started, watched, restarted, and always stopped by id.

A child that dies by a signal (killed, out of memory) is started again, since its state is in its checkpoint and in the
store. A child that exits with an error is started again too, but only a few times in a row: an error that repeats is a
bug, and the run ends with the child's last words.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from mgrpo.errors import ConfigError, MgrpoError

MAX_ERRORS_IN_A_ROW = 3
HEALTHY_SECONDS = 20.0  # a child that lived this long had a good start: its next error counts as the first
STOP_SECONDS = 15.0


class ChildFailed(MgrpoError):
    """A process of the run keeps failing; the message carries its last words."""


@dataclass
class _Child:
    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    healthy: float = HEALTHY_SECONDS
    errors: int = 0
    restarts: int = 0


class Supervisor:
    """Use as a context manager: leaving it, by whatever way, leaves no process behind."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, _Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, arguments: Sequence[str], healthy: float = HEALTHY_SECONDS) -> None:
        """Run `python -m mgrpo *arguments` as child `name`; its output goes to <logs>/<name>.log. healthy: seconds of
        life after which an error counts as the first again."""
        command = [sys.executable, "-m", "mgrpo", *arguments, "--parent", str(os.getpid())]
        log = self._logs / f"{name}.log"
        self._children[name] = _Child(command, log, self._spawn(command, log), healthy=healthy)

    def _spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then stops the children.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def poll(self) -> list[str]:
        """Restart what died; returns one line for each restart. Raises ChildFailed or ConfigError."""
        lines = []
        for name, child in self._children.items():
            code = child.process.poll()
            if code is None or code == 0:
                continue
            if code == 2:
                raise ConfigError(f"{name}: {last_words(child.log)}")
            if code > 0:
                healthy = time.monotonic() - child.started > child.healthy
                child.errors = 1 if healthy else child.errors + 1
                if child.errors >= MAX_ERRORS_IN_A_ROW:
                    raise ChildFailed(
                        f"{name} failed {child.errors} times in a row, last with: {last_words(child.log)} "
                        f"(log: {child.log})"
                    )
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"error: {last_words(child.log)}"
            child.restarts += 1
            child.process, child.started = self._spawn(child.command, child.log), time.monotonic()
            lines.append(f"{name} ended by {why}; started again (restart {child.restarts})")
        return lines

    def running(self) -> list[str]:
        return [name for name, child in self._children.items() if child.process.poll() is None]

    def pids(self) -> Mapping[str, int]:
        return {name: child.process.pid for name, child in self._children.items()}

    def stop(self, names: Sequence[str] | None = None) -> None:
        """SIGTERM, then SIGKILL after STOP_SECONDS; in the given order, the default in the reverse of starting."""
        order = list(names) if names is not None else list(reversed(self._children))
        for name in order:
            if self._children[name].process.poll() is None:
                self._children[name].process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for name in order:
            process = self._children[name].process
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def wait(self, names: Sequence[str], seconds: float) -> list[str]:
        """Wait until the named children have exited by themselves; returns those that have not."""
        deadline = time.monotonic() + seconds
        while (left := [n for n in names if n in self.running()]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def last_words(log: Path) -> str:
    """The last line a child wrote that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def die_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the launcher dies, whatever kills it (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, by, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(f"the launcher (pid {parent}) is gone")
