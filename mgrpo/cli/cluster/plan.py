"""From a config to the parts of its run: where each runs, what it listens at, what it needs, what starts before it.

All parts share one folder, which every machine sees at the same path, and in it one config file that has every address.
A part that listens binds all addresses of its machine at its port; the others reach it by its host's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mgrpo.config import RunConfig, load_config, view_of
from mgrpo.config.policy import EXTERNAL
from mgrpo.engines.registry import find_engine
from mgrpo.errors import ConfigError
from mgrpo.trainers.registry import find_trainer
from mgrpo.types import MAIN

STORE, MONITOR, TRAINER, ROLLOUT = "store", "monitor", "trainer", "rollout"
CPUS_OF_SERVER = 4  # tokenising, scheduling and HTTP beside a GPU
_PLACE = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True, slots=True)
class Part:
    """One job, service or pod."""

    name: str
    command: tuple[str, ...]
    host: str
    """Where the others find it; for SLURM the node it is pinned to."""
    ports: tuple[int, ...] = ()
    after: tuple[str, ...] = ()
    cpus: int = 1
    gpus: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    serves_for_ever: bool = False
    """Ends only when it is stopped; the others end with the run."""
    is_server: bool = False
    """An inference server, which runs in an environment or image of its own."""


@dataclass(frozen=True, slots=True)
class Site:
    """What differs between targets. root: the run's folder as the parts see it. hosts: node of each place, or None
    where a part's name is its host's name."""

    root: Path
    python: str
    server_python: str | None  # of inference servers; None: engine.python of the config
    hosts: Mapping[str, str] | None
    base_port: int
    gpus_per_node: int

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    def host(self, name: str, *places: str) -> str:
        """Host of the part `name`: its own name, or the node given for the first of the places that has one."""
        if self.hosts is None:
            return name
        for place in places:
            if place in self.hosts:
                return self.hosts[place]
        raise ConfigError(f"no node for {places[-1]}: add --host {places[-1]}=NODE")


@dataclass(frozen=True, slots=True)
class Plan:
    """The config with every address, and the parts in an order in which they can be started."""

    config: RunConfig
    site: Site
    parts: tuple[Part, ...]


def make_plan(path: Path, overrides: Sequence[str], site: Site) -> Plan:
    """Raises ConfigError for anything that could not run."""
    config = load_config(path, overrides)
    for role in config.policy_roles:
        find_engine(view_of(config, role))
        if config.agents[role].policy.trainer == EXTERNAL:
            find_trainer(
                view_of(config, role)
            )  # refuses it: what starts a program of the user's is not known
    _check_places(config, site)
    ports = _Ports(site.base_port)
    addresses = list(_addresses(config, site, ports))
    resolved = load_config(path, [*overrides, *addresses])
    parts = tuple(_parts(resolved, config, site))
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        double = next(n for n in names if names.count(n) > 1)
        raise ConfigError(f"two parts would be called {double!r}: rename one of the agents")
    for part in parts:
        if part.gpus > site.gpus_per_node:
            raise ConfigError(
                f"{part.name} needs {part.gpus} GPUs, a node has {site.gpus_per_node} (--gpus-per-node)"
            )
    return Plan(resolved, site, parts)


class _Ports:
    """Numbers that no two parts share, so that any of them may be on one machine."""

    def __init__(self, base: int) -> None:
        self._next = base

    def take(self) -> int:
        if not 1024 <= self._next <= 65535:
            raise ConfigError(f"port {self._next}: expected 1024 to 65535; choose another --port")
        self._next += 1
        return self._next - 1


def part_name(text: str) -> str:
    """A name that hosts, services and jobs may have."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _check_places(config: RunConfig, site: Site) -> None:
    for role in config.roles:
        if not _PLACE.fullmatch(role):
            raise ConfigError(f"agent {role!r}: expected letters, digits, dashes and underscores, 40 at most")
    servers = [role for role in config.policy_roles if config.agents[role].engine.started_servers]
    places = {STORE, ROLLOUT, *config.policy_roles, *(_servers(config, role) for role in servers)}
    for name in site.hosts or ():
        if name not in places:
            raise ConfigError(f"--host {name}=...: no such part; expected one of {', '.join(sorted(places))}")
    if site.hosts is None:
        fixed = [("store.url", config.store.url)]
        fixed += [(f"agents.{role}.url", config.agents[role].url) for role in config.roles]
        for name, url in fixed:
            if url is not None:
                raise ConfigError(f"{name} is set; containers are found by their names, so remove it")


def _addresses(config: RunConfig, site: Site, ports: _Ports) -> Iterator[str]:
    """The overrides that fill in what the config leaves open."""
    port = ports.take()
    if config.store.url is None:
        yield f'store.url="tcp://{_host(site, STORE)}:{port}"'
    for role in config.roles:
        port = ports.take()
        if config.agents[role].url is None:
            yield f'agents.{role}.url="tcp://{_host(site, TRAINER, config.policy_of(role))}:{port}"'
    for role in config.policy_roles:
        if n := config.agents[role].engine.started_servers:
            hosts = [_server_host(config, site, role, i) for i in range(n)]
            urls = [f'"http://{host}:{ports.take()}"' for host in hosts]
            yield f"agents.{role}.engine.urls=[{', '.join(urls)}]"
            yield f"agents.{role}.engine.replicas=1"  # has no meaning beside urls
    if config.link.keys is None and not config.link.insecure:
        yield f'link.keys="{site.root / "keys"}"'


def _name(kind: str, *which: str | int) -> str:
    return part_name("-".join(map(str, (kind, *which))))


def _host(site: Site, kind: str, *which: str | int) -> str:
    """Host of a part, by the places that its node may be given for."""
    places = (str(which[0]),) if kind == TRAINER else (STORE if kind == MONITOR else kind, MAIN)
    return site.host(_name(kind, *which), *places)


def _servers(config: RunConfig, role: str) -> str:
    """The place of the servers of `role`'s policy, e.g. vllm-main."""
    return f"{config.agents[role].engine.type}-{role}"


def _server_host(config: RunConfig, site: Site, role: str, replica: int) -> str:
    place = _servers(config, role)
    return site.host(_name(place, replica), place, role)


def _parts(resolved: RunConfig, config: RunConfig, site: Site) -> Iterator[Part]:
    mgrpo = (site.python, "-m", "mgrpo")
    yield _store(resolved, site)
    yield Part(MONITOR, (*mgrpo, "monitor", str(site.root)), _host(site, MONITOR), after=(STORE,))
    needed = [STORE]
    for role in config.policy_roles:
        for replica in range(config.agents[role].engine.started_servers):
            needed.append(_name(_servers(config, role), replica))
            yield _inference_server(resolved, site, role, replica)
    for role in config.policy_roles:
        needed.append(_name(TRAINER, role))
        yield _trainer(resolved, site, role)
    engines = [resolved.agents[role].engine for role in config.policy_roles]
    for worker in range(resolved.rollout.workers):
        yield Part(
            _name(ROLLOUT, worker),
            (*mgrpo, "rollout", str(site.config), "--worker", str(worker), "--out", str(site.root)),
            _host(site, ROLLOUT, worker),
            after=tuple(needed),
            cpus=resolved.rollout.threads,
            gpus=int(any(engine.worker_device == "cuda" for engine in engines)),
        )


def _store(config: RunConfig, site: Site) -> Part:
    url = str(config.store.url)
    command = [site.python, "-m", "mgrpo", "store", "--config", str(site.config), "--out", str(site.root)]
    command += ["--set", f"store.url={_everywhere(url)}"]
    return Part(STORE, tuple(command), _host(site, STORE), (_port(url),), serves_for_ever=True)


def _trainer(config: RunConfig, site: Site, role: str) -> Part:
    """`mgrpo trainer` is its own torchrun where the policy has several ranks."""
    agent, ranks = config.agents[role], config.ranks(role)
    command = [
        *(site.python, "-m", "mgrpo", "trainer", str(site.config)),
        *("--agent", role, "--out", str(site.root)),
    ]
    urls = {name: str(config.agents[name].url) for name in config.roles_of(role)}
    for name, url in urls.items():
        command += ["--set", f"agents.{name}.url={_everywhere(url)}"]
    return Part(
        _name(TRAINER, role),
        tuple(command),
        _host(site, TRAINER, role),
        tuple(_port(url) for url in urls.values()),
        after=(STORE,),
        cpus=config.trainer.threads * ranks,
        gpus=ranks if agent.policy.device == "cuda" else 0,
    )


def _inference_server(config: RunConfig, site: Site, role: str, replica: int) -> Part:
    port = _port(config.agents[role].engine.running_servers[replica])
    view = view_of(config, role)
    start = find_engine(view).command(view, f"http://0.0.0.0:{port}")
    return Part(
        _name(_servers(config, role), replica),
        (site.server_python or start.arguments[0], *start.arguments[1:]),
        _server_host(config, site, role, replica),
        (port,),
        cpus=CPUS_OF_SERVER if start.gpus else config.rollout.threads,
        gpus=start.gpus,
        environment=start.variables,
        serves_for_ever=True,
        is_server=True,
    )


def _port(url: str) -> int:
    port = url.rpartition(":")[2]
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"address {url!r}: expected tcp://HOST:PORT with a port from 1 to 65535")
    return int(port)


def _everywhere(url: str) -> str:
    """What a server binds so that `url` reaches it: names of hosts can be connected to, not bound."""
    return f"tcp://*:{_port(url)}"
