"""A server as a process of the run: how it is started, watched and stopped.

A server is several processes. Its front end, when killed, may leave the one that holds the model behind; so the process
that the launcher starts is a supervisor of ours, which starts the server as a group and ends the whole group, whatever
ends first:

    launcher -> supervisor (mgrpo engine) -> the server's front end -> its engine and workers
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket as sockets
import subprocess
import time
from pathlib import Path

from mgrpo.engines.backend import ServerCommand
from mgrpo.errors import DeadlineError
from mgrpo.waiting import wait_until

STOP_SECONDS = 8.0  # of the 15 that the launcher gives a child
SILENT_SECONDS = 20.0  # without a listener, once there was one
POLL_SECONDS = 0.2


def run_server(command: ServerCommand, socket: Path) -> int:
    """Run a server until it ends; its exit status, negative for a signal. SIGTERM must raise SystemExit here."""
    socket.unlink(missing_ok=True)  # of a server that was killed
    process = subprocess.Popen(
        command.arguments,
        env=os.environ | command.variables,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        _wait(process.pid, socket)
    finally:
        _end_group(process)
        socket.unlink(missing_ok=True)
    return process.returncode


def _wait(pid: int, socket: Path) -> None:
    """Until the server has ended (it is not reaped yet: the group's number stays ours), or does not listen any more. A
    front end of vLLM 0.32 whose worker was killed may close its socket and live on."""
    heard: float | None = None
    while _alive(pid):
        now = time.monotonic()
        if _listens(socket):
            heard = now
        elif heard is not None and now - heard > SILENT_SECONDS:
            print(
                f"error: the server lives, and has not listened at {socket} for {SILENT_SECONDS:g} s: ending it"
            )
            return
        time.sleep(POLL_SECONDS)


def _listens(socket: Path) -> bool:
    """False where nobody does; a server that is too busy to accept counts as one that listens."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(socket))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the front end, which stops the others in order; then SIGKILL to what is left of the group."""
    if _alive(process.pid):
        os.kill(process.pid, signal.SIGTERM)  # not terminate(), which would reap it
        with contextlib.suppress(DeadlineError):
            wait_until(lambda: not _alive(process.pid), STOP_SECONDS, lambda: f"process {process.pid}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)


def _alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None


def _end_with_parent() -> None:
    """In the new process: the kernel sends it SIGTERM when the supervisor is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
