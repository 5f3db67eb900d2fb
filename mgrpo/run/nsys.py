"""A process of a run under NVIDIA's `nsys profile`: this process becomes the one that starts nsys and stops the work.

    launcher -> this process -> nsys profile -> the same command again, which finds that it is inside and does its work

nsys captures between two calls of the work (profiling/tools.py). A signal to stop goes from here to the work itself,
which has a checkpoint to write; nsys ends after it, with its status, and then this process. Not yet run with a GPU; the
tests run it with a stand-in for nsys.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mgrpo.config.profile import ProfileConfig
from mgrpo.errors import ConfigError
from mgrpo.files import write_atomic

PROGRAM = "nsys"
INSIDE = "MGRPO_INSIDE_NSYS"
"""Environment variable: the process that started nsys, and the file to which the work writes its process id."""
OPTIONS = (
    *("--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
    *("--trace=cuda,nvtx,osrt", "--force-overwrite=true"),
)
LOOK_SECONDS = 0.1
START_SECONDS = 30.0  # for the work to begin once it is to stop; then nsys itself is told to
ALIVE_SECONDS = 1.0  # between two looks of the work at the process that would stop it


def check_nsys(config: ProfileConfig) -> None:
    """Raise ConfigError where the config needs nsys and this machine does not have it."""
    if config.steps is not None and config.tool == "nsys" and shutil.which(PROGRAM) is None:
        raise ConfigError(
            f'profile.tool is "nsys", but there is no program {PROGRAM} on the PATH: install NVIDIA Nsight Systems '
            '(its command line is enough, the package nsight-systems-cli), or set profile.tool = "torch"'
        )


def is_inside() -> bool:
    """Whether this process was started by run_under_nsys()."""
    return INSIDE in os.environ


def run_under_nsys(name: str, command: Sequence[str], folder: Path) -> NoReturn:
    """Run `command` under nsys, which writes <folder>/<name>.nsys-rep, and end as it ends. Raises
    ConfigError where nsys cannot be started."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f".{name}.pid"
    note.unlink(missing_ok=True)
    prefix = [PROGRAM, "profile", *OPTIONS, f"--output={folder / name}"]
    stopping: list[float] = []  # when each signal came

    def on_signal(number: int, frame: FrameType | None) -> None:
        stopping.append(time.monotonic())

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        process = subprocess.Popen([*prefix, *command], env={**os.environ, INSIDE: f"{os.getpid()}:{note}"})
    except OSError as error:
        raise ConfigError(f"{PROGRAM} cannot be started: {error.strerror}") from None
    told = 0
    while (code := process.poll()) is None:
        if len(stopping) > told:
            work = _noted(note)
            if work is None and time.monotonic() - stopping[0] > START_SECONDS:
                work = process.pid
            if work is not None:
                told = len(stopping)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(work, signal.SIGTERM)
        time.sleep(LOOK_SECONDS)
    note.unlink(missing_ok=True)
    if code < 0:  # end as it ended, so that who watches us sees a signal and no error
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def _noted(note: Path) -> int | None:
    """The work's process id; None until it has written it, and then it has nothing to save yet."""
    try:
        return int(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


@contextlib.contextmanager
def inside_nsys() -> Iterator[None]:
    """Around the work, which ends when the process that would stop it has gone. Does nothing elsewhere."""
    if not is_inside() or "RANK" in os.environ:  # a rank is its torchrun's to stop
        yield
        return
    starter, _, note = os.environ[INSIDE].partition(":")
    write_atomic(Path(note), str(os.getpid()))
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(ALIVE_SECONDS):
            if not _lives(starter):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watching = threading.Thread(target=watch, name="mgrpo-nsys", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _lives(process: str) -> bool:
    """Whether this process id is one that runs; one that has ended may wait for its parent for long."""
    try:
        status = Path("/proc", process, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
