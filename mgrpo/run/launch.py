"""`mgrpo train`: one command that runs a whole team on this machine.

Starts the store, one trainer an agent and the rollout workers as processes of their own, shows their reports, writes
metrics.jsonl, curves.png and summary.json, and leaves nothing behind. It takes no part in the computation: the
processes go by the same config and the same store when they are started one by one on several servers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mgrpo.config import RunConfig, check_same_run, dump_config, load_config, view_of
from mgrpo.engines.base import PATIENCE_SECONDS
from mgrpo.engines.registry import find_engine
from mgrpo.errors import ConfigError, MgrpoError, StartValidationError
from mgrpo.model.folder import check_chat_folder, check_experts, check_folder
from mgrpo.model.routers import routing_in
from mgrpo.planning.state import check_state
from mgrpo.run.external import ExternalTrainers, check_external, external_roles
from mgrpo.run.folder import RunFolder, recorded_run, started_engines
from mgrpo.run.importing import importing
from mgrpo.run.interrupts import Interrupts
from mgrpo.run.lock import take_lock
from mgrpo.run.monitor import Monitor, Outcome
from mgrpo.run.nsys import check_nsys
from mgrpo.run.processes import check_plugins, load_run_task
from mgrpo.run.progress import Display
from mgrpo.run.supervisor import HEALTHY_SECONDS, QUIET_SECONDS, STOP_SECONDS, Supervisor
from mgrpo.trajectory_log.format import MAX_EXPERTS

GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")  # NVIDIA, AMD, Windows' subsystem
PROFILE_SECONDS = 300.0  # for a rollout worker that is stopped while a profiler looks, to write what it has
ENGINE_HEALTHY = 300.0  # a server that fails while it starts, which takes minutes, fails for good
LOOK_SECONDS = 0.1
END_SECONDS = 30.0  # for the parts to end by themselves once the run is over; then they get SIGTERM


def start(config_path: Path, out: Path, overrides: Sequence[str], *, fresh: bool) -> None:
    """Begin a new run in `out`."""
    config = load_config(config_path, overrides)
    folder = RunFolder(out)
    _check(config, folder)
    _check_free(folder, fresh)
    with _locked(folder) as lock:
        _check_free(folder, fresh)  # another launcher may have begun and ended a run meanwhile
        _check_metrics(config)
        for entry in list(out.iterdir()):
            if entry != folder.lock:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        dump_config(config, folder.config)
        _Launch(config, folder, lock).run()


def resume(out: Path, overrides: Sequence[str]) -> None:
    """Go on with the run in `out` from its last checkpoints. A setting that may change is written down once the store
    has accepted the run; until then, and where one may not change, the folder stays as it was."""
    folder = RunFolder(out)
    if not folder.config.exists():
        raise ConfigError(f"{out}: no run to resume (no {folder.config.name})")
    recorded, config = recorded_run(out), load_config(folder.config, overrides)
    try:
        check_same_run(recorded, config)
    except ConfigError as error:
        raise ConfigError(f"{out}: {error}") from None
    _check(config, folder)

    def accepted() -> None:
        if config != recorded:
            dump_config(config, folder.config)

    with _locked(folder) as lock:
        _check_metrics(config)
        _Launch(config, folder, lock, overrides, accepted).run()


def _check(config: RunConfig, folder: RunFolder) -> None:
    """What can be known to fail fails here, before a folder or a process exists."""
    folder.check_sockets(config)
    check_plugins(config)
    check_external(config)
    check_nsys(config.profile)
    with importing():
        task = load_run_task(config)
    for role in config.policy_roles:
        view, where = view_of(config, role), f"agents.{role}"
        agent = view.agent
        if agent.model is not None:
            check_folder(Path(agent.model), f"{where}.model", view.longest, task.chat)
            check_experts(Path(agent.model), f"{where}.policy", agent.policy)
            if agent.policy.routing_replay and not agent.frozen:
                _check_reported(Path(agent.model), where, view.longest)
            if task.chat:
                check_chat_folder(Path(agent.model), f"{where}.model", task.chat_use)
        _check_gpu(agent.policy.device, f"{where}.policy.device")
        _check_gpu(agent.engine.started_device, f"{where}.engine.device")
        find_engine(view).check(view)
    check_state(config)


def _check_reported(folder: Path, where: str, longest: int) -> None:
    """Whether the experts of a trajectory of `longest` tokens travel to its trainer."""
    try:
        found = routing_in(folder, where)
    except ConfigError:  # an engine that needs to know says so
        return
    if (size := longest * found.token_bytes) > MAX_EXPERTS:
        raise ConfigError(
            f"{where}.policy.routing_replay=true with max_length {longest}: the experts of so many tokens are {size} "
            f"bytes, {found.token_bytes} a token, the limit is {MAX_EXPERTS}; set max_length to at most "
            f"{MAX_EXPERTS // found.token_bytes}"
        )


def _check_gpu(device: str, name: str) -> None:
    """Whether the driver's devices are there; whether torch can use them is found out by the process that will."""
    if device == "cuda" and not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        raise ConfigError(
            f'{name} is "cuda", but this machine has no GPU (none of /dev/{", /dev/".join(GPU_DEVICES)})'
        )


def _check_metrics(config: RunConfig) -> None:
    """Under the folder's lock: before, a store of this very run might hold the port."""
    if config.store.metrics_port is not None:
        from mgrpo.store.server import check_metrics_port

        check_metrics_port(config.store.metrics_port)


def _check_free(folder: RunFolder, fresh: bool) -> None:
    """Raise ConfigError where the folder holds something that a new run would destroy."""
    out = folder.root
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out")
    if folder.config.exists():
        if not fresh and not _failed_untrained(folder):
            raise ConfigError(
                f"{out} already holds a run: --resume {out} goes on with it, --fresh deletes it"
            )
    elif any(entry != folder.lock for entry in out.iterdir()):
        raise ConfigError(f"{out} is neither empty nor a run's folder; choose another --out")


def _failed_untrained(folder: RunFolder) -> bool:
    """Whether the folder holds nothing but a run that failed before anything was trained; it may be replaced."""
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(summary, dict)
        and summary.get("outcome") == Outcome.FAILED.value
        and summary.get("trained") is False
    )


@contextmanager
def _locked(folder: RunFolder) -> Iterator[int]:
    """One launcher a folder. The lock file goes with the run; the kernel drops the lock with its last process."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder.root}: cannot make the run's folder ({error.strerror})") from None
    lock = take_lock(folder.lock)
    try:
        yield lock
    finally:
        for path in (folder.lock, folder.database_lock):  # nobody serves the folder any more
            path.unlink(missing_ok=True)
        os.close(lock)


class _Launch:
    """One life of a run under this launcher: start, watch, end."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        lock: int,
        overrides: Sequence[str] = (),
        accepted: Callable[[], None] = lambda: None,
    ) -> None:
        """overrides: those that the recorded config does not hold yet. accepted: what to do once the store has accepted
        the run."""
        self._config, self._folder, self._lock = config, folder, lock
        self._sets = [f"--set={override}" for override in overrides]
        self._accepted = accepted

    def run(self) -> None:
        """Raises StartValidationError, MgrpoError or KeyboardInterrupt when the run does not finish."""
        folder, outcome = self._folder, Outcome.INTERRUPTED
        with (
            Interrupts() as interrupts,
            Display() as display,
            folder.sockets(self._config),
            Supervisor(
                folder.logs, lambda line: display.line(line, "yellow"), interrupts, [self._lock]
            ) as children,
        ):
            monitor = Monitor(self._config, folder, display)
            externals = ExternalTrainers(self._config, folder, display.line)
            try:
                outcome = self._train(monitor, children, interrupts, display, externals)
            except KeyboardInterrupt:
                display.line(f"interrupted; go on with: mgrpo train --resume {folder.root}", "yellow")
            except MgrpoError as error:
                outcome, monitor.reason = Outcome.FAILED, str(error)
                display.line(f"the run ends: {error}", "red")
                raise
            finally:
                # Trainers write a last checkpoint when they get SIGTERM; the store must still be there for it.
                children.stop([name for name in children.pids() if name != "store"])
                self._release(externals, monitor, interrupts, display)
                monitor.close(outcome)
                shutil.rmtree(folder.weights, ignore_errors=True)
        if outcome is Outcome.INVALID:
            raise StartValidationError(monitor.reason)
        if outcome is Outcome.FAILED:
            raise MgrpoError(monitor.reason)
        if outcome is Outcome.INTERRUPTED:
            raise KeyboardInterrupt

    def _release(
        self, externals: ExternalTrainers, monitor: Monitor, interrupts: Interrupts, display: Display
    ) -> None:
        """Wait until the external trainers have seen that the run is over, or stops for now, and have left."""
        if not externals.present:
            return
        monitor.end("the launcher stops")
        count, began, explained = interrupts.count, time.monotonic(), False
        while (waited := time.monotonic() - began) < self._config.trainer.stop_timeout:
            monitor.poll()
            left = externals.present & set(monitor.trainers or ())
            if not left or interrupts.count > count:
                return
            if not explained and waited > QUIET_SECONDS:
                explained = True
                names = ", ".join(sorted(left))
                display.line(
                    f"waiting for the external trainer of {names} to leave (Ctrl-C ends this)", "yellow"
                )
            time.sleep(LOOK_SECONDS)

    def _train(
        self,
        monitor: Monitor,
        children: Supervisor,
        interrupts: Interrupts,
        display: Display,
        externals: ExternalTrainers,
    ) -> Outcome:
        """Start all parts and watch them until the run is over. Raises KeyboardInterrupt, ChildFailed, ConfigError."""

        def watch() -> None:
            interrupts.check()
            for line in children.poll():
                display.line(line, "yellow")

        files = ["--config", str(self._folder.config), "--out", str(self._folder.root)]
        children.start("store", ["store", *files, *self._sets])
        monitor.connect(watch, self._config.store.idle_timeout)
        self._accepted()
        self._start_others(children)
        externals.begin()
        # What serves all has got somewhere when anybody has.
        serving = ["store", *(name for name in children.pids() if name.startswith("engine-"))]
        while (outcome := monitor.poll()) is Outcome.RUNNING:
            if monitor.advanced:
                children.advanced([*monitor.advanced, *serving])
                monitor.advanced.clear()
            externals.look(monitor.trainers)
            watch()
            time.sleep(LOOK_SECONDS)
        others = [name for name in children.pids() if name not in serving]
        if left := children.wait(others, END_SECONDS):
            display.line(f"stopping {', '.join(left)}", "yellow")
        monitor.poll()  # what they said last
        return outcome

    def _start_others(self, children: Supervisor) -> None:
        config = self._config
        files = [str(self._folder.config), "--out", str(self._folder.root)]
        # An error after a wait as long as this one is one in a row all the same.
        healthy = HEALTHY_SECONDS + max(config.store.idle_timeout, PATIENCE_SECONDS)
        external = external_roles(config)
        for role in config.policy_roles:
            if role in external:
                continue
            children.start(
                f"trainer-{role}",
                ["trainer", *files, "--agent", role],
                healthy,
                stop_seconds=config.trainer.stop_timeout,
                saves="" if config.agents[role].frozen else "write its checkpoint",
            )
        for role, replica in started_engines(config):
            which = ["--agent", role, "--replica", str(replica)]
            children.start(f"engine-{role}-{replica}", ["engine", *files, *which], ENGINE_HEALTHY)
        for worker in range(config.rollout.workers):
            profiled = config.profile.looks_at_worker(worker)
            children.start(
                f"rollout-{worker}",
                ["rollout", *files, "--worker", str(worker)],
                healthy,
                stop_seconds=PROFILE_SECONDS if profiled else STOP_SECONDS,
                saves="write its profile" if profiled else "",
            )
