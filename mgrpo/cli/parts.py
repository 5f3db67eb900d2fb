"""The processes of a run, one function each, and the folder they share on one machine.

Every part is started with the same config file. Addresses that the config leaves open become local sockets in a folder
that follows from --out, so parts that are started by hand find each other as those of the launcher do.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mgrpo.cli.lock import is_locked
from mgrpo.cli.processes import die_with_parent
from mgrpo.cli.sockets import check_sockets, make_sockets, socket_folder
from mgrpo.config import RunConfig, config_digest, load_config
from mgrpo.config.addresses import Addresses
from mgrpo.credit import check_names
from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.rollout.serve import check_startable, keep, server_command, starts_servers
from mgrpo.rollout.task import Task
from mgrpo.store.records import RunParams


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def live(self) -> bool:
        """Whether a launcher, or a process that a killed one left behind, is at work here."""
        return is_locked(self.lock)

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def database(self) -> Path:
        return self.root / "store.db"

    @property
    def database_lock(self) -> Path:
        return self.root / "store.db.lock"

    @property
    def agents(self) -> Path:
        return self.root / "agents"

    def agent(self, role: str) -> Path:
        """Checkpoints, spool and policies of one agent; exists on that agent's server only."""
        return self.agents / role

    def rollouts(self, worker: int) -> Path:
        """What one rollout worker records; exists on that worker's server only."""
        return self.root / "rollouts" / str(worker)

    @property
    def weights(self) -> Path:
        """Versions on their way to vLLM servers; of no use once the run has ended."""
        return self.root / "weights"

    def engine_socket(self, role: str, replica: int) -> Path:
        """Where a vLLM server that the launcher starts listens."""
        return self.socket_folder / _engine_name(role, replica)

    @property
    def socket_folder(self) -> Path:
        """Of the local sockets; see sockets.py."""
        return socket_folder(self.root)

    def check_sockets(self, config: RunConfig) -> None:
        """Raise ConfigError where the run's local sockets could not be made; nothing is written."""
        if names := _local_sockets(config):
            check_sockets(self.socket_folder, names)

    def make_room_for_sockets(self, config: RunConfig) -> None:
        """The folder of the local sockets, where the run has any. Raises ConfigError where it is not safe to use."""
        self.check_sockets(config)
        if _local_sockets(config):
            make_sockets(self.socket_folder)

    @contextmanager
    def sockets(self, config: RunConfig) -> Iterator[None]:
        """The folder of the local sockets, removed with everything in it at the end."""
        self.make_room_for_sockets(config)
        folder = self.socket_folder
        try:
            yield
        finally:
            if _local_sockets(config):
                shutil.rmtree(folder, ignore_errors=True)

    def addresses(self, config: RunConfig) -> Addresses:
        local = self.socket_folder
        return Addresses(
            store=config.store.url or f"ipc://{local}/store",
            agents={r: a.url or f"ipc://{local}/{r}" for r, a in config.agents.items()},
            keys=Path(config.link.keys) if config.link.keys is not None else None,
            insecure=config.link.insecure,
            engines={
                r: tuple(
                    f"unix://{self.engine_socket(r, i)}" for i in range(config.agents[r].engine.replicas)
                )
                for r in config.policy_roles
                if starts_servers(config.agents[r].engine)
            },
            weights=self.weights,
        )


def _local_sockets(config: RunConfig) -> list[str]:
    """The names of the sockets that a run has on this machine."""
    urls = {"store": config.store.url} | {role: agent.url for role, agent in config.agents.items()}
    return [
        *(name for name, url in urls.items() if url is None),
        *(_engine_name(role, replica) for role, replica in started_engines(config)),
    ]


def _engine_name(role: str, replica: int) -> str:
    return f"engine-{role}-{replica}"


def started_engines(config: RunConfig) -> list[tuple[str, int]]:
    """Role and number of each vLLM server that the launcher starts."""
    return [
        (role, replica)
        for role in config.policy_roles
        if starts_servers(config.agents[role].engine)
        for replica in range(config.agents[role].engine.replicas)
    ]


def recorded_run(root: Path) -> RunConfig:
    """The config of the run in a folder. Raises ConfigError when it is not one."""
    folder = RunFolder(root)
    if not folder.config.exists():
        raise ConfigError(f"{root}: not a run's folder (no {folder.config.name})")
    return load_config(folder.config)


def load_run_task(config: RunConfig) -> Task:
    """The task of a config. Raises ConfigError when its options, the config's roles or their rewards do not fit it."""
    from mgrpo.tasks import load_task

    task = load_task(config.task.name, config.task.options, config.roles)
    for role, names in task.scores.items():
        if role in config.agents:
            check_names(role, config.agents[role].reward, names)
    return task


def run_params(config: RunConfig) -> RunParams:
    """What the store must know of a run to admit, deliver and refuse."""
    return RunParams(
        run=config.task.name,
        digest=config_digest(config),
        roles=list(config.roles),
        training_roles=list(config.training_roles),
        k=config.trainer.group_size,
        batch=config.trainer.questions,
        max_lag=config.trainer.max_lag,
        lease_s=config.store.lease,
        group_timeout_s=config.store.group_timeout,
        in_order=True,
    )


def run_store_process(config_path: Path, out: Path, overrides: Sequence[str], parent: int | None) -> None:
    """The run's store, until SIGTERM. Raises MgrpoError when its serving thread ends by itself."""
    from mgrpo.store.server import run_store
    from mgrpo.transport.keys import server_keys

    config = _begin(config_path, overrides, parent, _leave_at_once)
    folder = RunFolder(out)
    folder.make_room_for_sockets(config)
    out.mkdir(parents=True, exist_ok=True)
    addresses = folder.addresses(config)
    run_store(
        addresses.store,
        folder.database,
        run_params(config),
        security=server_keys(addresses),
        insecure=addresses.insecure,
    )


def run_trainer_process(
    config_path: Path, role: str, out: Path, overrides: Sequence[str], parent: int | None
) -> None:
    """One agent's trainer, until the run is over."""
    config = _begin(config_path, overrides, parent, _leave_at_once)
    signal.signal(signal.SIGINT, _leave_at_once)
    if role not in config.agents:
        raise ConfigError(f"--agent {role}: unknown role; the config has {', '.join(config.roles)}")
    if config.owner(role) != role:
        raise ConfigError(f"--agent {role}: it shares a policy; start the trainer of {config.owner(role)!r}")
    folder = RunFolder(out)
    folder.make_room_for_sockets(config)
    if config.ranks(role) == 1:
        _train(config, role, folder)
        return
    from mgrpo.cli.ranks import as_rank, run_ranks
    from mgrpo.trainer.ranks import under_torchrun

    if under_torchrun():
        as_rank(lambda: _train(config, role, folder))
    else:
        sets = [f"--set={o}" for o in overrides]
        arguments = ["trainer", str(config_path), "--agent", role, "--out", str(out), *sets]
        run_ranks(config.ranks(role), arguments, config.trainer.threads, config.trainer.stop_timeout)


def _train(config: RunConfig, role: str, folder: RunFolder) -> None:
    """Rank 0 of a trainer, or one of the others."""
    from mgrpo.trainer.crew import Crew
    from mgrpo.trainer.process import TrainerProcess
    from mgrpo.trainer.ranks import Ranks

    device = config.agents[role].policy.device
    limits = (config.store.idle_timeout, config.trainer.stop_timeout)
    with Ranks(config.ranks(role), device, *limits) as ranks:
        if not ranks.leads:
            Crew(config, role, folder.agent(role), ranks).follow()
            return
        task, addresses = load_run_task(config), folder.addresses(config)
        with TrainerProcess(config, role, task, folder.agents, addresses, ranks) as trainer:
            trainer.run()


def run_worker_process(
    config_path: Path, worker: int, out: Path, overrides: Sequence[str], parent: int | None
) -> None:
    """One rollout worker, until the run is over."""
    from mgrpo.rollout.worker import run_worker

    config = _begin(config_path, overrides, parent, _unwind)
    if not 0 <= worker < config.rollout.workers:
        raise ConfigError(f"--worker {worker}: expected 0 to {config.rollout.workers - 1} (rollout.workers)")
    folder = RunFolder(out)
    run_worker(config, worker, load_run_task(config), folder.addresses(config), folder.rollouts(worker))


def run_engine_process(
    config_path: Path, role: str, replica: int, out: Path, overrides: Sequence[str], parent: int | None
) -> None:
    """One vLLM server of `role`'s policy, until it ends or SIGTERM."""
    config = _begin(config_path, overrides, parent, _unwind)
    if role not in config.policy_roles:
        raise ConfigError(f"--agent {role}: expected one with a policy: {', '.join(config.policy_roles)}")
    engine = config.agents[role].engine
    if not starts_servers(engine) or not 0 <= replica < engine.replicas:
        raise ConfigError(f"--replica {replica}: the config starts no such server for {role!r}")
    check_startable(config, role)
    folder = RunFolder(out)
    folder.make_room_for_sockets(config)
    socket = folder.engine_socket(role, replica)
    code = keep(server_command(config, role, ("--uds", str(socket))), socket)
    if code == 0:  # its engine has died, for instance; nobody told it to end
        raise MgrpoError(f"the vLLM server of {role!r} ended by itself; its last words are above")
    if code < 0:  # end as it ended, so that who watches us sees a signal and no error
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def _begin(
    config_path: Path,
    overrides: Sequence[str],
    parent: int | None,
    on_sigterm: Callable[[int, FrameType | None], None],
) -> RunConfig:
    if parent is not None:  # a rank has no use for a last word: those who would hear it end as well
        die_with_parent(parent, signal.SIGKILL if "RANK" in os.environ else signal.SIGTERM)
    signal.signal(signal.SIGTERM, on_sigterm)
    return load_config(config_path, overrides)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """For as long as a part has nothing to save: an exception could come up in any line, even of a library's callback
    that swallows it. A part with something to save replaces this by a mark that its loop looks at."""
    os._exit(0)


def _unwind(number: int, frame: FrameType | None) -> None:
    """For parts whose context managers end other processes. Once: the kernel may send the launcher's death twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)
