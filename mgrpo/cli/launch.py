"""`mgrpo train`: one command that runs a whole team on this machine.

Starts the store, one trainer an agent and the rollout workers as processes of their own, shows their reports, writes
metrics.jsonl, curves.png and summary.json, and leaves nothing behind. It takes no part in the computation: the
processes go by the same config and the same store when they are started one by one on several servers.
"""

from __future__ import annotations

import fcntl
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mgrpo.cli.monitor import Monitor, Outcome
from mgrpo.cli.parts import RunFolder, load_run_task
from mgrpo.cli.processes import HEALTHY_SECONDS, Supervisor
from mgrpo.cli.progress import Display
from mgrpo.config import RunConfig, dump_config, load_config
from mgrpo.errors import ConfigError, GateError, MgrpoError
from mgrpo.model.folder import check_chat_folder, check_folder
from mgrpo.rollout.serve import check_engine, starts_servers
from mgrpo.rollout.server import PATIENCE_SECONDS

START_SECONDS = 60.0
GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # NVIDIA, AMD, Windows' subsystem
ENGINE_HEALTHY = 300.0  # a vLLM server that fails while it starts, which takes minutes, fails for good


def start(config_path: Path, out: Path, overrides: Sequence[str], *, fresh: bool) -> None:
    """Begin a new run in `out`."""
    config = load_config(config_path, overrides)
    _check(config)
    folder = RunFolder(out)
    if folder.config.exists() and not fresh:
        raise ConfigError(f"{out} already holds a run: --resume {out} goes on with it, --fresh deletes it")
    if out.exists() and any(out.iterdir()) and not folder.config.exists():
        raise ConfigError(f"{out} is neither empty nor a run's folder; choose another --out")
    with _locked(folder):
        for entry in list(out.iterdir()):
            if entry != folder.lock:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        dump_config(config, folder.config)
        _run(config, folder)


def resume(out: Path, overrides: Sequence[str]) -> None:
    """Go on with the run in `out` from its last checkpoints."""
    folder = RunFolder(out)
    if not folder.config.exists():
        raise ConfigError(f"{out}: no run to resume (no {folder.config.name})")
    config = load_config(folder.config, overrides)
    _check(config)
    with _locked(folder):
        dump_config(config, folder.config)
        _run(config, folder)


def _check(config: RunConfig) -> None:
    """What can be known to fail fails here, before a folder or a process exists."""
    task = load_run_task(config)
    for role in config.policy_roles:
        agent, where = config.agents[role], f"agents.{role}"
        if agent.model is not None:
            length = max(config.agents[r].max_length for r in config.served_by(role))
            check_folder(Path(agent.model), f"{where}.model", length, task.chat)
            if task.chat:
                check_chat_folder(Path(agent.model), f"{where}.model", task.chat_use)
        _check_gpu(agent.policy.device, f"{where}.policy.device")
        if not agent.engine.urls:
            _check_gpu(agent.engine.device, f"{where}.engine.device")
        if agent.engine.kind == "vllm":
            check_engine(config, role)


def _check_gpu(device: str, name: str) -> None:
    """Whether the driver's devices are there; whether torch can use them is found out by the process that will."""
    if device == "cuda" and not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        raise ConfigError(
            f'{name} is "cuda", but this machine has no GPU (none of /dev/{", /dev/".join(GPU_DEVICES)})'
        )


def _run(config: RunConfig, folder: RunFolder) -> None:
    # Both end a run as Ctrl-C does, also where a shell started it in the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    outcome = Outcome.INTERRUPTED
    with Display() as display, Supervisor(folder.logs) as children, folder.sockets():
        path = str(folder.config)
        children.start("store", ["store", "--config", path, "--out", str(folder.root)])
        # An error after a wait as long as this one is one in a row all the same.
        healthy = HEALTHY_SECONDS + max(config.store.idle_timeout, PATIENCE_SECONDS)
        monitor = Monitor(config, folder, display)
        try:
            monitor.connect(lambda: children.poll(), START_SECONDS)
            for role in config.policy_roles:
                children.start(
                    f"trainer-{role}", ["trainer", path, "--agent", role, "--out", str(folder.root)], healthy
                )
            for role, replica in _engines(config):
                which = ["--agent", role, "--replica", str(replica)]
                children.start(
                    f"engine-{role}-{replica}",
                    ["engine", path, *which, "--out", str(folder.root)],
                    ENGINE_HEALTHY,
                )
            for worker in range(config.rollout.workers):
                children.start(
                    f"rollout-{worker}",
                    ["rollout", path, "--worker", str(worker), "--out", str(folder.root)],
                    healthy,
                )
            while (outcome := monitor.poll()) is Outcome.RUNNING:
                for line in children.poll():
                    display.line(line, "yellow")
                time.sleep(0.1)
            others = [name for name in children.pids() if name != "store" and not name.startswith("engine-")]
            if left := children.wait(others, 30.0):
                display.line(f"stopping {', '.join(left)}", "yellow")
            monitor.poll()  # what they said last
        except KeyboardInterrupt:
            display.line(f"interrupted; go on with: mgrpo train --resume {folder.root}", "yellow")
            outcome = Outcome.INTERRUPTED
        finally:
            # Trainers write a last checkpoint when they are told to stop, and the store must still be there for it.
            children.stop([name for name in children.pids() if name != "store"])
            monitor.close(outcome)
            shutil.rmtree(folder.weights, ignore_errors=True)
    if outcome is Outcome.INVALID:
        raise GateError(monitor.reason)
    if outcome is Outcome.FAILED:
        raise MgrpoError(monitor.reason)
    if outcome is Outcome.INTERRUPTED:
        raise KeyboardInterrupt


def _engines(config: RunConfig) -> list[tuple[str, int]]:
    """Role and number of each vLLM server that is ours to start."""
    return [
        (role, replica)
        for role in config.policy_roles
        if starts_servers(config.agents[role].engine)
        for replica in range(config.agents[role].engine.replicas)
    ]


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """One launcher a folder. The lock file goes with the run; the kernel drops the lock with the process."""
    folder.root.mkdir(parents=True, exist_ok=True)
    with folder.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder.root}: another mgrpo train is running in this folder") from None
        try:
            yield
        finally:
            for lock in (folder.lock, folder.database_lock):  # nobody serves the folder any more
                lock.unlink(missing_ok=True)
