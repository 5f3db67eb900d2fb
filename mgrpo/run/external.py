"""Programs of the user's that train one agent's policy: how they take part (mgrpo.feed), and how the launcher, which
does not start them, knows that they are there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mgrpo.config import RunConfig, check_same_run, config_digest, load_config
from mgrpo.config.policy import EXTERNAL, PolicyConfig
from mgrpo.errors import ConfigError, DeadlineError, MgrpoError, PeerError
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.processes import check_plugins, load_run_task
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.transport.keys import client_keys

if TYPE_CHECKING:  # what it needs takes seconds to import
    from mgrpo.pipeline.external import ExternalFeed

LOOK_SECONDS = 0.5
START_SECONDS = 60.0  # for a launcher that was started together with the program to make the run's folder


@contextmanager
def feed(
    run: str | os.PathLike[str], role: str, out: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> Iterator[ExternalFeed]:
    """Train the policy of `role` with a loop of your own, in a run that `mgrpo train` has started:

    with mgrpo.feed("run.toml", "sub", "runs/one") as feed:
        for step in feed:
            feed.applied(train(step.minibatches))
            feed.publish(model)
            feed.saved(feed.step)  # when your checkpoint of so many steps is durable

    run: the run's TOML file, with agents.<role>.policy.trainer = "external", or the config.json that its folder keeps.
    out: the run's folder on this machine. overrides: those that the run was started with, e.g. "trainer.steps=40".

    Entering waits up to store.idle_timeout for the run's store. Leaving it after the last step writes the final policy
    and serves it until the run is over; leaving it before, by an error for instance, leaves the run waiting for the
    next one. Raises ConfigError for a role that the run does not have, or that another program or mgrpo itself trains,
    and for settings that are not the run's.
    """
    folder = RunFolder(Path(out))
    if Path(run) == folder.config:
        _wait_for_run(folder)
    config = load_config(Path(run), overrides)
    _check_role(config, role)
    _check_run(config, folder, run)
    check_plugins(config)
    task, addresses = load_run_task(config), folder.addresses(config)
    _wait_for_store(config, role, folder)
    if folder.config.exists():  # how long the run is, for instance, is for the launcher to say
        config = recorded_run(folder.root)
    from mgrpo.pipeline.external import ExternalFeed

    folder.make_socket_folder(config)
    try:
        opened = ExternalFeed.open(config, role, folder.agents, addresses)
    except ConfigError as error:
        raise ConfigError(f"feed of {role}: {error}; a program already trains this agent?") from None
    with opened:
        opened.begin(task)
        yield opened
        opened.finish()


def _check_role(config: RunConfig, role: str) -> None:
    if role not in config.agents:
        raise ConfigError(f"feed of {role}: unknown role; the run has {', '.join(config.roles)}")
    if (owner := config.policy_of(role)) != role:
        raise ConfigError(f"feed of {role}: it shares a policy; take the feed of {owner!r}")
    if (trainer := config.agents[role].policy.trainer) != EXTERNAL:
        raise ConfigError(
            f'feed of {role}: agents.{role}.policy.trainer is "{trainer}"; set it to "{EXTERNAL}" where a program of '
            "yours trains this agent"
        )


def _check_run(config: RunConfig, folder: RunFolder, run: str | os.PathLike[str]) -> None:
    """Where the launcher is on this machine, its folder says what the run is."""
    if config.store.url is None:
        _wait_for_run(folder)
    if folder.config.exists():
        try:
            check_same_run(recorded_run(folder.root), config)
        except ConfigError as error:
            settings = str(error).partition(": cannot change")[0]
            raise ConfigError(
                f"{os.fspath(run)}: not the settings of the run in {folder.root} (run -> yours): {settings}; give the "
                f"overrides that the run has, or take {folder.config} as it is"
            ) from None
    elif config.store.url is None:
        raise ConfigError(
            f"{folder.root}: no run there; start it first: mgrpo train {os.fspath(run)} --out {folder.root}"
        )


def _wait_for_run(folder: RunFolder) -> None:
    """For a launcher that was started together with this program; one that does not come is found out later."""
    deadline = time.monotonic() + START_SECONDS
    while not folder.config.exists() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def _wait_for_store(config: RunConfig, role: str, folder: RunFolder) -> None:
    """Until the launcher has created the run."""
    addresses = folder.addresses(config)
    deadline = time.monotonic() + config.store.idle_timeout
    client = TrainerClient(
        addresses.store, f"trainer:{role}", name=f"trainer-{role}", run=config_digest(config),
        key=client_keys(addresses, role), timeout=min(config.store.timeout, 5.0),
    )  # fmt: skip
    with client:
        while True:
            try:
                client.params()
                return
            except (DeadlineError, PeerError) as error:
                refused = isinstance(error, PeerError) and "[NOT_CREATED]" not in str(error)
                if refused or time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_SECONDS)


def external_roles(config: RunConfig) -> list[str]:
    """The roles whose policy a program of the user's trains."""
    return [role for role in config.policy_roles if config.agents[role].policy.trainer == EXTERNAL]


def check_external(config: RunConfig) -> None:
    """Raise ConfigError for a setting that a program of the user's does not go by."""
    for role in external_roles(config):
        agent, where = config.agents[role], f"agents.{role}"
        because = f'with {where}.policy.trainer = "{EXTERNAL}"'
        if agent.frozen:
            raise ConfigError(
                f"{where}.frozen = true {because}: nobody trains a frozen policy; leave policy.trainer out"
            )
        if agent.engine.direct or agent.engine.adapter_only:
            what = (
                "sends no weights straight to servers" if agent.engine.direct else "publishes whole weights"
            )
            raise ConfigError(f'{where}.engine.sync {because}: a feed {what}; use "fs" or "patch"')
        plain = PolicyConfig()
        for name in ("lora", "last_layers", "mesh", "aux_loss_coef", "train_router"):
            if getattr(agent.policy, name) != getattr(plain, name):
                raise ConfigError(
                    f"{where}.policy.{name} {because}: what trains is up to your program; leave it out"
                )


class ExternalTrainers:
    """What the launcher knows of them: from the signs of life that they give the store."""

    def __init__(self, config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
        """say: takes a line for people."""
        self._limit = config.store.idle_timeout
        self._grace = (
            config.store.heartbeat_timeout / 2
        )  # a store that was started again has not heard of it yet
        self._folder, self._say = folder, say
        self._seen: dict[
            str, float
        ] = {}  # role -> when it was last there, at first when the launcher began to wait
        self.present: set[str] = set()
        self.roles = external_roles(config)

    def _how(self, role: str) -> str:
        run = f'"{self._folder.config}", "{role}", "{self._folder.root}"'
        return f"a program with mgrpo.feed({run}), see docs/embedding/feed.md"

    def begin(self) -> None:
        """From now on they are waited for."""
        for role in self.roles:
            self._seen[role] = time.monotonic()
            self._say(f"the trainer of {role} is external: start {self._how(role)}")

    def look(self, present: Sequence[str] | None) -> None:
        """present: roles whose trainer the store knows of; None: the store did not answer. Raises MgrpoError where one
        has not been there for store.idle_timeout."""
        now = time.monotonic()
        for role in self.roles:
            if present is None:  # nobody can know
                self._seen[role] = now
            elif role in present:
                if role not in self.present:
                    self._say(f"the external trainer of {role} is there")
                self.present.add(role)
                self._seen[role] = now
            elif role in self.present and now - self._seen[role] > self._grace:
                self.present.remove(role)
                self._say(f"the external trainer of {role} is gone; start it again: {self._how(role)}")
            elif now - self._seen[role] > self._limit:
                raise MgrpoError(
                    f"the external trainer of {role} was not there for {self._limit:g} s (store.idle_timeout): start "
                    f"{self._how(role)}"
                )
