"""Helpers for tests that start whole runs: every process is stopped by id, whatever the test does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RELAY, ALONE = ROOT / "tests" / "relay.toml", ROOT / "tests" / "alone.toml"
"""The same task with three agents, and with one, whose run starts in half the time."""
DOOMED = """
import os, runpy, signal, sys
from mgrpo.pipeline.feed import Feed
applied = Feed.applied
def doomed(self, metrics):
    applied(self, metrics)
    if self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
Feed.applied = doomed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs the program that is its first argument, which trains through mgrpo.feed, and is killed with the third RL step
applied and not saved."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mgrpo", *arguments]


def train(config: Path, out: Path, *overrides: str, timeout: float = 800) -> str:
    """A whole run; returns its output. Fails the test with that output when the run does."""
    sets = [f"--set={o}" for o in overrides]
    return finish(command("train", str(config), "--out", str(out), *sets), timeout)


def resume(out: Path, *overrides: str, timeout: float = 800) -> str:
    return finish(command("train", "--resume", str(out), *[f"--set={o}" for o in overrides]), timeout)


def finish(arguments: Sequence[str], timeout: float) -> str:
    with started(arguments) as process:
        output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


@contextmanager
def started(
    arguments: Sequence[str], env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test; SIGTERM first, so that it stops its own children. env: beside ours."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def steps_of(out: Path, role: str = "main") -> int:
    """The last step that a role has reported."""
    return max((int(r["step"]) for r in records(out) if f"{role}/reward/mean" in r), default=0)


def records(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def summary(out: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return data


def final_weights(out: Path) -> dict[str, bytes]:
    """The bytes of every trained policy."""
    found = {p.parent.parent.name: p.read_bytes() for p in out.glob("agents/*/final/model.safetensors")}
    assert found, f"no final policy below {out}"
    return found


def processes_of(out: Path) -> dict[str, int]:
    """Name -> pid of every process whose command line names the run's folder, the launcher aside. Worker 0 is called
    "rollout", the others "rollout-1" and so on."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"--parent" in words:
            name = words[words.index(b"mgrpo") + 1].decode()
            if b"--agent" in words:
                name += "-" + words[words.index(b"--agent") + 1].decode()
            if b"--worker" in words and (number := words[words.index(b"--worker") + 1].decode()) != "0":
                name += f"-{number}"
            found[name] = int(entry.name)
    return found


def kill(out: Path, name: str) -> None:
    os.kill(processes_of(out)[name], signal.SIGKILL)


def leftovers(out: Path) -> list[str]:
    """Processes, sockets and locks that a run left behind."""
    from mgrpo.run.folder import RunFolder

    sockets = RunFolder(out).socket_folder
    left = [f"process {name} ({pid})" for name, pid in processes_of(out).items()]
    left += [str(sockets)] if sockets.exists() else []
    left += [str(p) for p in out.rglob("*lock*") if p.is_file()]
    return left


def trained_ages(out: Path) -> Counter[int]:
    """How many trajectories were trained at which age: the step less the version of their oldest token."""
    from mgrpo.store.records import InvocationDone, RolloutFinal
    from mgrpo.transport import codec

    ages: Counter[int] = Counter()
    with contextlib.closing(sqlite3.connect(out / "store.db")) as database:
        steps = {
            (role, query): step
            for role, query, step in database.execute(
                "SELECT role, query, step FROM deliveries WHERE state IN ('applied', 'committed')"
            )
        }
        attempts = {
            (query, rollout): codec.decode(body, RolloutFinal).attempt
            for query, rollout, kind, body in database.execute(
                "SELECT query, rollout, kind, body FROM rollouts WHERE kind = 'final'"
            )
        }
        for (body,) in database.execute("SELECT body FROM invocations"):
            record = codec.decode(body, InvocationDone)
            step = steps.get((record.role, record.query))
            if step is not None and attempts.get((record.query, record.rollout)) == record.attempt:
                ages[step - record.version_min] += 1
    return ages
