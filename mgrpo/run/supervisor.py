"""The processes of a run on this machine: started, watched, restarted, and always stopped by id.

While the run goes on, a child that ends is started again, however it ended: its state is in its checkpoint and in the
store. Restarts wait longer each time, and they end: a child that dies again and again without having got anywhere is a
bug, a model that does not fit into memory or a broken machine, and the run ends with the child's name and its last line
of output. Exit status 2 (a mistake in the config, a damaged file) ends the run at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.run.interrupts import Interrupts

MAX_FAILURES = 3  # in a row: errors, crashes, and deaths of whatever kind right at the start
MAX_DEATHS = (
    10  # in a row of any kind: a SIGKILL may come from outside, or each time from the out-of-memory killer
)
START_SECONDS = 2.0  # a child that dies so soon has not been killed by somebody who picked it
HEALTHY_SECONDS = 20.0  # a child that lived this long had a good start: its next death counts as the first
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before a restart; by the number of deaths in a row
STOP_SECONDS = 15.0  # for a child that has nothing to save
KILL_SECONDS = 10.0  # for the kernel to end a child after SIGKILL; one that waits for a dead disk stays
QUIET_SECONDS = 2.0  # a stop that takes longer is explained
# Signals that a process brings upon itself by what it does, rather than by what others do to it.
CRASHES = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSYS,
        signal.SIGTRAP,
    }
)


class ChildFailed(MgrpoError):
    """A process of the run keeps failing; the message carries its last line of output."""


@dataclass
class _Child:
    command: Sequence[str]
    log: Path
    healthy: float
    stop_seconds: float
    saves: str  # what it does when it is stopped: "write its checkpoint"
    process: subprocess.Popen[bytes]
    begins: int  # where its present life begins in the log
    started: float = field(default_factory=time.monotonic)
    again: float | None = None  # when it is started again; None: it runs, or its end has not been noticed yet
    why: str = ""  # how it ended
    failures: int = 0  # in a row, see MAX_FAILURES
    deaths: int = 0  # in a row, see MAX_DEATHS
    restarts: int = 0


class Supervisor:
    """Use as a context manager: leaving it, by whatever way, leaves no process behind."""

    def __init__(
        self,
        logs: Path,
        on_event: Callable[[str], object] = lambda line: None,
        interrupts: Interrupts | None = None,
        inherit: Sequence[int] = (),
    ) -> None:
        """on_event takes lines for the user. interrupts: one more than there are when `stop` is first called ends all
        patience. inherit: descriptors that the children keep open."""
        self._logs, self._on_event, self._inherit = logs, on_event, tuple(inherit)
        self._interrupts = interrupts or Interrupts()
        self._patient_until: int | None = None  # count of interrupts
        self._children: dict[str, _Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        healthy: float = HEALTHY_SECONDS,
        *,
        stop_seconds: float = STOP_SECONDS,
        saves: str = "",
    ) -> None:
        """Run `python -m mgrpo *arguments` as child `name`; its output goes to <logs>/<name>.log.

        healthy: seconds of life after which a death counts as the first again. stop_seconds: how long it may take to
        stop, and `saves` what it does meanwhile, e.g. "write its checkpoint"."""
        command = [sys.executable, "-m", "mgrpo", *arguments, "--parent", str(os.getpid())]
        log = self._logs / f"{name}.log"
        process, begins = self._spawn(command, log)
        self._children[name] = _Child(command, log, healthy, stop_seconds, saves, process, begins)

    def _spawn(self, command: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
        with log.open("ab") as out:
            begins = out.tell()
            # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which then stops the children.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                pass_fds=self._inherit,
            )
            return process, begins

    def advanced(self, names: Iterable[str]) -> None:
        """These children have done something that no earlier life of theirs had: what they died of before is over."""
        for name in names:
            if name in self._children:
                self._children[name].failures = self._children[name].deaths = 0

    def poll(self) -> list[str]:
        """Restart what died, after a pause; returns one line for each restart. To be called while the run goes on: a
        child that ends with status 0 is started again as well. Raises ChildFailed or ConfigError."""
        lines = []
        for name, child in self._children.items():
            code = child.process.poll()
            if code is None:
                continue
            if child.again is None:
                self._ended(name, child, code)
            if child.again is not None and time.monotonic() >= child.again:
                child.restarts += 1
                child.process, child.begins = self._spawn(child.command, child.log)
                child.started, child.again = time.monotonic(), None
                lines.append(f"{name} {child.why}; started again (restart {child.restarts})")
        return lines

    def _ended(self, name: str, child: _Child, code: int) -> None:
        """Judge how a child has ended: when to start it again, or why not."""
        if code == 2:
            raise ConfigError(f"{name}: {last_words(child.log, child.begins)}")
        lived = time.monotonic() - child.started
        if lived > child.healthy:
            child.failures = child.deaths = 0
        child.deaths += 1
        child.failures += code > 0 or -code in CRASHES or lived < START_SECONDS
        if code < 0:
            child.why = f"ended by signal {_name(-code)}"
        elif code > 0:
            child.why = f"ended by error: {last_words(child.log, child.begins)}"
        else:
            child.why = "ended with status 0 before the run was over"
        if child.failures >= MAX_FAILURES or child.deaths >= MAX_DEATHS:
            hint = "; is the machine out of memory?" if -code == signal.SIGKILL else ""
            if code > 0:
                words = last_words(child.log, child.begins)
                text = f"{name} failed {child.failures} times in a row, last with: {words}"
            else:
                times = max(child.failures, child.deaths)
                text = (
                    f"{name} died {times} times in a row without progress, the last time it {child.why}{hint}"
                )
            raise ChildFailed(f"{text} (log: {child.log})")
        child.again = time.monotonic() + PAUSES[min(child.deaths, len(PAUSES)) - 1]

    def running(self) -> list[str]:
        """Those that run at this moment."""
        return [name for name, child in self._children.items() if child.process.poll() is None]

    def pids(self) -> Mapping[str, int]:
        return {name: child.process.pid for name, child in self._children.items()}

    def stop(self, names: Sequence[str] | None = None) -> None:
        """SIGTERM, in the given order, the default in the reverse of starting; SIGKILL to each that takes longer than
        its stop_seconds, and to all of them at the next interrupt."""
        order = list(names) if names is not None else list(reversed(self._children))
        children = {name: self._children[name] for name in order}
        if self._patient_until is None:
            self._patient_until = self._interrupts.count
        for child in children.values():
            if child.process.poll() is None:
                child.process.terminate()
        began, explained = time.monotonic(), False
        while left := {name: child for name, child in children.items() if child.process.poll() is None}:
            waited = time.monotonic() - began
            for name, child in left.items():
                if self._interrupts.count > self._patient_until:
                    self._kill(name, child, "killed before it had stopped")
                elif waited > child.stop_seconds:
                    self._kill(name, child, f"did not stop within {child.stop_seconds:g} s and was killed")
                else:
                    continue
                del children[name]
            if not explained and waited > QUIET_SECONDS:
                explained = True
                for name, child in left.items():
                    saves = f" to {child.saves}" if child.saves else " to stop"
                    self._on_event(
                        f"waiting for {name}{saves} (up to {child.stop_seconds:g} s; Ctrl-C again ends it now)"
                    )
            time.sleep(0.02)

    def _kill(self, name: str, child: _Child, what: str) -> None:
        self._on_event(f"{name} {what} (log: {child.log})")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        try:
            child.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._on_event(
                f"{name} (pid {child.process.pid}) cannot be killed: it waits for the system, a disk perhaps"
            )

    def wait(self, names: Sequence[str], seconds: float) -> list[str]:
        """Wait until the named children have exited by themselves; returns those that have not, after `seconds` or at
        an interrupt."""
        deadline = time.monotonic() + seconds
        while (left := [n for n in names if n in self.running()]) and time.monotonic() < deadline:
            if self._interrupts.count:
                break
            time.sleep(0.05)
        return left

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name
        return str(number)


def last_words(log: Path, begins: int = 0) -> str:
    """The last line a child wrote that says something, from byte `begins` of its log on."""
    with log.open("rb") as file:
        file.seek(begins)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def die_with_parent(parent: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the launcher dies, whatever kills it (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, by, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(f"the launcher (pid {parent}) is gone")
