"""A rollout worker's agents: the engine of each role, and the newest weights of its trainer in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig
from mgrpo.engines.base import Engine
from mgrpo.engines.registry import open_engine
from mgrpo.environments.episode import Agent
from mgrpo.errors import CorruptionError, DeadlineError
from mgrpo.pipeline.worker_loop import WorkerLoop
from mgrpo.record import spans
from mgrpo.transport.client import Client
from mgrpo.weights.pull import Progress, Pull, fetch_policy_files, fetch_weights
from mgrpo.weights.version import Weights

PULL_REPORT_SECONDS = 10.0  # between two reports of weights that are long under way
WAIT_SLICE = 1.0  # seconds between two looks at the run's state while waiting


def lane_of(role: str) -> str:
    """Of the spans of a role's weights."""
    return f"weights {role}"


@dataclass(slots=True)
class _Source:
    """Where one role's weights come from, and which the engine holds."""

    client: Client
    engine: Engine
    report: Callable[[str], None]
    pull: Pull
    label: str = ""


class Team:
    """`agents` are there once connect() has returned. close() ends their engines."""

    def __init__(
        self, config: RunConfig, addresses: Addresses, clients: Mapping[str, Client], loop: WorkerLoop
    ) -> None:
        """clients: of each role's trainer."""
        self.agents: dict[str, Agent] = {}
        self._config, self._addresses, self._clients, self._loop = config, addresses, clients, loop
        self._sources: dict[str, _Source] = {}

    def connect(
        self, log: Callable[[str], None], tokenizer: Callable[[str, Mapping[str, bytes]], None]
    ) -> None:
        """Build each role's engine from the policy files of its trainer, which may still be in SFT. log: takes a
        line for people; tokenizer: takes each role's policy files."""
        for role in self._config.roles:
            client = self._clients[role]
            files = self._policy_files(client)
            tokenizer(role, files)
            agent = self._config.agents[role]
            engine, words = open_engine(self._config, role, files, self._addresses, on_event=log)
            pull = Pull(self._pull_progress(role, log), self._addresses.weights)
            self._sources[role] = _Source(client, engine, log, pull)
            self.agents[role] = Agent(role, engine, words, agent.loss.temperature, agent.max_length)

    def _policy_files(self, client: Client) -> dict[str, bytes]:
        """The policy's files without weights. Its trainer may be in SFT, for any time, or be between two lives, for
        idle_timeout seconds."""
        answered = time.monotonic()
        while True:
            try:
                if files := fetch_policy_files(client, WAIT_SLICE):
                    return files
                answered = time.monotonic()
            except DeadlineError:
                if time.monotonic() - answered > self._config.store.idle_timeout:
                    raise
            self._loop.check()

    def sync(self, at_least: Mapping[str, int]) -> int:
        """Bring every engine to its trainer's newest weights, those of a role in `at_least` to this version or a later
        one; returns the oldest version of the training roles."""
        for role in self._sources:
            wanted = at_least.get(role, 0)
            while (weights := self.fetch(role, wanted)) is not None:
                self._loop.run(self.load(role, weights))
                if self._sources[role].engine.version >= wanted:  # else: an older one had begun to arrive
                    break
        return min(self.versions().values())

    def versions(self) -> dict[str, int]:
        """Of each training role, what its engine holds."""
        return {role: self._sources[role].engine.version for role in self._config.training_roles}

    def waiting(self) -> int:
        """Requests that wait in the engines."""
        return sum(source.engine.waiting() for source in self._sources.values())

    async def load(self, role: str, weights: Weights) -> None:
        """Swap a role's weights. Rollouts may be running: an engine does it between two decode steps. Where the
        engine cannot use them, it gets the newest version whole. Raises CorruptionError where it cannot use that
        either."""
        source = self._sources[role]
        with spans.span("update", role, lane_of(role)) as seen:
            try:
                await source.engine.load(weights, weights.version)
            except CorruptionError as error:
                source.report(f"{role}: {error}; taking a whole version")
                weights.close()
                source.label = ""
                whole = await asyncio.to_thread(self.fetch, role, weights.version)
                assert whole is not None
                weights = whole
                await source.engine.load(weights, weights.version)
            weights.close()
            source.label = weights.label
            seen |= {"version": weights.version, "label": weights.label}

    def fetch(self, role: str, at_least: int) -> Weights | None:
        """A role's newest weights, of this version or a later one, once its trainer has them; None when they are those
        that its engine holds. Blocks; one call of a role at a time. Raises Shutdown when the run ends meanwhile,
        DeadlineError naming the trainer when none have come for idle_timeout seconds, CorruptionError where they
        arrived damaged twice."""
        source, damaged = self._sources[role], False
        since, received = time.monotonic(), source.pull.received
        began = spans.now()
        while True:
            try:
                whole = not source.engine.takes_patches or not source.label
                weights = fetch_weights(
                    source.client, source.label, at_least, WAIT_SLICE, source.pull, whole=whole
                )
                if weights is not None:
                    args: spans.Args = {"version": weights.version, "label": weights.label}
                    spans.add("fetch", role, lane_of(role), began, spans.now(), args)
                return weights
            except CorruptionError as error:
                if damaged:
                    raise
                damaged = True
                source.report(f"{role}: {error}; asking again")
                source.label = ""
            except DeadlineError:
                if source.pull.received != received:  # a slow link, but it moves
                    since, received = time.monotonic(), source.pull.received
                else:
                    began = spans.now()  # nothing of it was under way yet
                if time.monotonic() - since > self._config.store.idle_timeout:
                    raise
            self._loop.check()

    def _pull_progress(self, role: str, log: Callable[[str], None]) -> Progress:
        """Called each second while weights arrive: a slow link is reported, and the end of the run noticed."""
        reported = 0.0

        def progress(received: int, size: int) -> None:
            nonlocal reported
            self._loop.check()
            if time.monotonic() - reported > PULL_REPORT_SECONDS:
                reported = time.monotonic()
                log(f"weights of {role}: {received / 2**20:.0f} of {size / 2**20:.0f} MiB arrived")

        return progress

    async def close(self) -> None:
        for source in self._sources.values():
            await source.engine.close()
