"""The folder of a run on one machine: where it keeps what, and the addresses of its parts.

Every part is started with the same config file. Addresses that the config leaves open become local sockets in a folder
that follows from --out, so parts that are started by hand find each other as those of the launcher do.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig, load_config
from mgrpo.errors import ConfigError
from mgrpo.run.lock import is_locked
from mgrpo.run.sockets import check_sockets, make_sockets, socket_folder


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
        """Checkpoints, trajectory log and policies of one agent; exists on that agent's server only."""
        return self.agents / role

    def rollouts(self, worker: int) -> Path:
        """What one rollout worker records; exists on that worker's server only."""
        return self.root / "rollouts" / str(worker)

    @property
    def profile(self) -> Path:
        """What profilers write of the processes on this server."""
        return self.root / "profile"

    @property
    def weights(self) -> Path:
        """Versions on their way to servers; of no use once the run has ended."""
        return self.root / "weights"

    def engine_socket(self, role: str, replica: int) -> Path:
        """Where a server that the launcher starts listens."""
        return self.socket_folder / _engine_name(role, replica)

    @property
    def socket_folder(self) -> Path:
        """Of the local sockets; see sockets.py."""
        return socket_folder(self.root)

    def check_sockets(self, config: RunConfig) -> None:
        """Raise ConfigError where the run's local sockets could not be made; nothing is written."""
        if names := _local_sockets(config):
            check_sockets(self.socket_folder, names)

    def make_socket_folder(self, config: RunConfig) -> None:
        """The folder of the local sockets, where the run has any. Raises ConfigError where it is not safe to use."""
        self.check_sockets(config)
        if _local_sockets(config):
            make_sockets(self.socket_folder)

    @contextmanager
    def sockets(self, config: RunConfig) -> Iterator[None]:
        """The folder of the local sockets, removed with everything in it at the end."""
        self.make_socket_folder(config)
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
                r: tuple(f"unix://{self.engine_socket(host, i)}" for i in range(n))
                for r in config.policy_roles
                if (n := config.agents[host := config.engine_of(r)].engine.started_servers)
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
    """Role and number of each server that the launcher starts."""
    return [
        (role, replica)
        for role in config.policy_roles
        for replica in range(config.agents[role].engine.started_servers)
    ]


def recorded_run(root: Path) -> RunConfig:
    """The config of the run in a folder. Raises ConfigError when it is not one."""
    folder = RunFolder(root)
    if not folder.config.exists():
        raise ConfigError(f"{root}: not a run's folder (no {folder.config.name})")
    return load_config(folder.config)
