"""Benches as child processes: started, timed, stopped at their deadline, and what they wrote.

    outcome = run(job_of("bench_store", ["--quick"], deadline_s=90), Path("build/bench"))

A bench is a process group of its own: at its deadline the group is killed, so that no client, store or rank of it goes
on. Its output is NAME.log and its figures are NAME.json, both in the folder.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).parent.parent
TAIL = 30  # lines of a failed bench's output that are kept
BEAT_S = 15.0  # between two progress lines of a bench
ROOM = 64e6  # bytes: a disk with less is full
Status = Literal["ok", "crashed", "hung", "not run"]


@dataclass(frozen=True, slots=True)
class Job:
    """One bench: `command` without --json; deadline_s: seconds of wall time."""

    name: str
    command: tuple[str, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a bench. figures: as Figure's fields and its verdict. seconds: wall time it took."""

    name: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(
        default_factory=list
    )  # what it printed about rivals and parts that it left out
    tail: str = ""  # the end of its output where it failed

    def value(self, item: str) -> float | None:
        """None where the bench has no such figure, or could not measure it here (NaN)."""
        found = next((float(f["value"]) for f in self.figures if f["item"] == item), math.nan)
        return None if math.isnan(found) else found


def job_of(name: str, arguments: Sequence[str], deadline_s: float) -> Job:
    """`python -m bench.NAME` with these arguments."""
    return Job(name, (sys.executable, "-m", f"bench.{name}", *arguments), deadline_s)


def stop_on_sigterm() -> None:
    """A command that is terminated stops its bench, too, as with Ctrl-C: the bench is in a session of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run(job: Job, folder: Path) -> Outcome:
    """Run one bench to its end or its deadline. No failure of the bench or the disk raises, and one that the machine
    has no room for is not run."""
    if full := _full(folder):
        return Outcome(job.name, "not run", reason=full)
    try:
        return _run(job, folder)
    except OSError as error:
        return Outcome(job.name, "not run", reason=str(error))


def _run(job: Job, folder: Path) -> Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    log, written = folder / f"{job.name}.log", folder / f"{job.name}.json"
    written.unlink(missing_ok=True)
    command = [*job.command, "--json", str(written)]
    # One thread a process, as the benches' figures mean it: torch's and BLAS's pools do not fight for the cores.
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "150", **os.environ}
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = _wait(process, job, began)
        finally:
            _stop(process)
    seconds = time.monotonic() - began
    text = log.read_text(errors="replace")
    found = Outcome(job.name, "not run", reason="it wrote no figures")
    status: Status
    if written.exists():
        found = outcome_of(job.name, written)
    if not ended:
        status, reason = "hung", f"still running after its deadline of {job.deadline_s:g} s"
    elif process.returncode and (full := _full(folder)):
        status, reason = "not run", full
    elif process.returncode == -signal.SIGKILL:
        status, reason = "not run", "killed by the system, as when its memory does not suffice"
    elif process.returncode:
        status, reason = "crashed", f"exit status {process.returncode}"
    else:
        status, reason = found.status, found.reason
    tail = "" if status == "ok" else "\n".join(text.splitlines()[-TAIL:])
    return replace(found, status=status, seconds=seconds, reason=reason, remarks=_remarks(text), tail=tail)


def _full(folder: Path) -> str:
    """Which of the disks that a bench writes to is full; "" where none is."""
    for place in (folder, Path(tempfile.gettempdir())):
        found = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        if (free := shutil.disk_usage(found).free) < ROOM:
            return f"the disk of {place} is full: {free / 1e6:.0f} MB are free"
    return ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a bench: its group, and descendants that have a session of their own, as ranks have."""
    descendants: list[psutil.Process] = []
    if process.poll() is None:
        with suppress(psutil.Error):
            descendants = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with suppress(psutil.Error):
            descendant.kill()
    with suppress(subprocess.TimeoutExpired):  # a disk that hangs holds even a killed process
        process.wait(30)


def outcome_of(name: str, path: Path) -> Outcome:
    """The figures of a file that a bench wrote."""
    try:
        data = json.loads(path.read_text())
        if "kernels" in data:
            return Outcome(name, "ok", figures=_compiled(data["kernels"]))
        figures = [{**f, "value": float(f["value"])} for f in data["figures"]]
        machine = {str(k): str(v) for k, v in data.get("machine", {}).items()}
        return Outcome(name, "ok", machine=machine, figures=figures)
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        return Outcome(name, "crashed", reason=f"its figures cannot be read: {wrong!r}")


def _wait(process: subprocess.Popen[bytes], job: Job, began: float) -> bool:
    """True when the process has ended by itself. A line every quarter of a minute."""
    while True:
        left = began + job.deadline_s - time.monotonic()
        if left <= 0:
            return False
        try:
            process.wait(min(left, BEAT_S))
            return True
        except subprocess.TimeoutExpired:
            elapsed = time.monotonic() - began
            if elapsed < job.deadline_s:
                print(f"   {job.name}: {elapsed:.0f} s of at most {job.deadline_s:g}", flush=True)


def _remarks(text: str) -> list[str]:
    """Lines that say what was left out, and why."""
    marks = ("missing rival:", "not measured", "nothing measured", "not assembled", "is missing", "needs ")
    lines = [line.strip() for line in text.splitlines() if not line.startswith("│")]  # notes of tables
    return [line for line in lines if any(mark in line for mark in marks)][:20]


def _compiled(kernels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """bench_compile's kernels as figures: nothing may spill."""
    return [
        {
            "item": f"{k['variant']}, sm_{k['arch']}: spilled",
            "value": float(k["spill_bytes"]),
            "unit": "B",
            "at_most": 0,
            "at_least": None,
            "note": f"{k['registers']} registers, {k['shared_bytes']} B shared",
            "compared": None,
            "verdict": "miss" if k["spill_bytes"] else "pass",
        }
        for k in kernels
    ]
