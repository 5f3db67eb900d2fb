"""Several servers of one policy behind one call: routing, health, removal, return.

    ready   answers requests
    down    asked nothing; looked at every WATCH_SECONDS until it is ready again

A request goes to the ready server with the fewest in flight. A conversation stays with its server, whose prefix cache
knows it, unless that one has SLACK requests more than the least loaded. A server that cannot be reached, broke off or
answers with weights older than those brought last goes down at once, by name, and its request is sent to another:
the tokens are a function of weights, prompt and seed, so nothing is lost or doubled. A server returns only after the
newest version has been brought to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from mgrpo.engines.vllm.client import Completion, ServerDown, ServerInfo, VllmClient
from mgrpo.engines.vllm.weight_sync import Label, WeightSync, parse_label
from mgrpo.errors import ConfigError, DeadlineError, InfrastructureError

log = logging.getLogger("mgrpo.engines")

WATCH_SECONDS = 2.0
SLACK = 8  # requests that a conversation's own server may have more than the least loaded
SETTLE_SECONDS = 20.0  # once one server is ready, how long the first update waits for the others
TELL_SECONDS = 30.0  # between two lines about a wait
SESSIONS = 65536  # conversations whose server is remembered

Ask = Callable[[VllmClient, str], Awaitable[Completion]]
"""Sends one request: (server, name of the model to ask for)."""


@dataclass(slots=True, eq=False)
class Replica:
    """One server as we know it."""

    server: VllmClient
    ready: bool = False
    reason: str = "not asked yet"  # why it is down
    info: ServerInfo | None = None
    label: Label | None = None  # what it served when we last looked
    in_flight: int = 0
    lost: int = 0  # times it went down


class EnginePool:
    """The servers of one policy. Use from one event loop; `close` ends the connections, not the servers."""

    def __init__(
        self,
        servers: Sequence[VllmClient],
        sync: WeightSync,
        *,
        timeout: float,
        max_length: int,
        say: Callable[[str], None] | None = None,
        watch: float = WATCH_SECONDS,
    ) -> None:
        """timeout: seconds that a request waits for a ready server. max_length: tokens that each must take.
        say: told in one line of every server that goes and comes. watch: seconds between two looks at each."""
        if not servers:
            raise ConfigError("no vllm server is named: urls is empty")
        self.replicas = [Replica(server) for server in servers]
        self.wanted: Label | None = None
        self._sync, self._timeout, self._max_length = sync, timeout, max_length
        self._say, self._watch_seconds = say or (lambda line: None), watch
        self._home: dict[str, Replica] = {}
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    # -- requests ------------------------------------------------------------------------------------------------

    async def ask(self, send: Ask, session: str | None) -> tuple[Completion, Label]:
        """The answer of some server to `send`, and the version that was asked for or newer. Raises what `send` raises;
        InfrastructureError naming every server when none is ready within timeout seconds."""
        deadline = time.monotonic() + self._timeout
        while True:
            replica = await self._acquire(session, deadline)
            wanted = self.wanted
            assert wanted is not None and replica.info is not None and replica.label is not None
            label = max(wanted, replica.label)
            replica.in_flight += 1
            lost = replica.lost
            try:
                answer = await send(replica.server, self._sync.model(replica.info.model, label))
                self._check_labels(replica, answer, wanted)
                return answer, label
            except InfrastructureError as error:
                if not isinstance(error, ServerDown) and await _lives(replica.server):
                    raise
                if replica.lost == lost:  # the first of its requests to notice
                    self._down(replica, str(error))
                if time.monotonic() >= deadline:
                    raise
            finally:
                replica.in_flight -= 1

    def _check_labels(self, replica: Replica, answer: Completion, wanted: Label) -> None:
        if not self._sync.labels_tokens:
            return
        if not answer.spans:
            raise ConfigError(
                f"{replica.server.url}: no weight versions in its answer; needs vLLM 0.32 or newer"
            )
        for span in answer.spans:
            label = parse_label(span.label)
            if label is None or label.role != wanted.role or label < wanted:
                raise ServerDown(
                    f"{replica.server.url}: answered with weights {span.label!r}, expected {wanted}"
                )

    async def _acquire(self, session: str | None, deadline: float) -> Replica:
        while True:
            self._watch()
            if replica := self._choose(session):
                return replica
            if self.wanted is None:
                raise InfrastructureError("no weights were loaded yet")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, min(1.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline and not self._choose(session):
                raise InfrastructureError(f"no server ready within {self._timeout:g} s: {self._reasons()}")

    def _choose(self, session: str | None) -> Replica | None:
        wanted = self.wanted
        ready = [r for r in self.replicas if r.ready and wanted is not None and r.label and r.label >= wanted]
        if not ready:
            return None
        least = min(ready, key=lambda r: r.in_flight)  # the first of equals
        if session is None:
            return least
        home = self._home.get(session, least)
        if home not in ready or home.in_flight > least.in_flight + SLACK:
            home = least
        self._home[session] = home
        if len(self._home) > SESSIONS:
            del self._home[next(iter(self._home))]
        return home

    def forget(self, session: str) -> None:
        """The conversation has ended."""
        self._home.pop(session, None)

    # -- versions ------------------------------------------------------------------------------------------------

    async def update(self, label: Label, patience: float) -> Label:
        """Bring a prepared version to all servers; the oldest version that one of them serves now.

        Servers that cannot be reached go down and get it when they return. Waits up to `patience` seconds for a first
        server, then raises InfrastructureError naming all. Raises ConfigError where one can never serve this policy,
        ValueError where it refuses what we say.
        """
        self.wanted = label
        began = told = time.monotonic()
        some = None  # when the first was ready
        while True:
            await self._over_all(self._bring)
            ready = [r for r in self.replicas if r.ready]
            now = time.monotonic()
            some = some if some is not None or not ready else now
            if len(ready) == len(self.replicas) or (some is not None and now - some >= self._settle()):
                self._watch()
                return min(r.label for r in ready if r.label is not None)
            if now - began > patience:
                raise InfrastructureError(
                    f"no server took weights {label} within {patience:g} s: {self._reasons()}"
                )
            if now - told > TELL_SECONDS:
                told = now
                self._tell(f"waiting for servers: {self._reasons()}")
            await asyncio.sleep(min(self._watch_seconds, 0.2 + (now - began) / 4))

    def _settle(self) -> float:
        """Seconds to wait for the rest; only for servers that have never been ready."""
        return SETTLE_SECONDS if any(r.info is None for r in self.replicas) else 0.0

    async def _bring(self, replica: Replica) -> None:
        """Make one server ready with the wanted version, or leave it down with the reason."""
        wanted = self.wanted
        if wanted is None or (replica.ready and replica.label is not None and replica.label >= wanted):
            return
        try:
            if not replica.ready:
                await self._examine(replica)
            replica.label = await self._sync.bring(replica.server, wanted)
        except (InfrastructureError, DeadlineError) as error:
            self._down(replica, str(error))
            return
        if replica.label < (self.wanted or wanted):  # a newer one was asked for meanwhile
            return
        if not replica.ready:
            replica.ready = True
            if replica.lost:
                self._tell(f"{replica.server.url} is back, with weights {replica.label}")
        self._changed.set()

    async def _examine(self, replica: Replica) -> None:
        """A server that starts to serve, or comes back. Raises ConfigError when it can never serve this policy."""
        server = replica.server
        await server.healthy()
        info = await server.info()
        if info.max_length < self._max_length:
            raise ConfigError(
                f"{server.url}: takes {info.max_length} tokens (max-model-len), max_length is {self._max_length}"
            )
        new = replica.info is None and not await self._sync.stuck(server)  # a paused server answers nothing
        if new and not await server.logprobs_follow_temperature(info.model):
            raise ConfigError(
                f"{server.url}: reports log-probs of another distribution than it samples from; "
                "start it with --logprobs-mode processed_logprobs"
            )
        replica.info = info

    # -- health --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Keep the watcher running; what it died of is raised here, where somebody hears it."""
        if self._watcher is not None and self._watcher.done():
            watcher, self._watcher = self._watcher, None
            watcher.result()
        if self._watcher is None:
            # A context of its own: it watches for all rollouts and must not end with the one that asked first.
            self._watcher = asyncio.get_running_loop().create_task(self._keep_watching(), context=Context())

    async def _keep_watching(self) -> None:
        while True:
            await asyncio.sleep(self._watch_seconds)
            await self._over_all(self._look)

    async def _look(self, replica: Replica) -> None:
        if not replica.ready:
            await self._bring(replica)
            return
        try:
            await replica.server.healthy()
            held = await self._sync.held(replica.server)
            if held is None:
                raise ServerDown(f"{replica.server.url}: holds weights of its own, {self.wanted} is wanted")
            wanted = max(held, self.wanted or held)
            # An update that is under way ends first; one whose worker has died is made again.
            if held < wanted or await self._sync.stuck(replica.server):
                held = await self._sync.bring(replica.server, wanted)
            replica.label = held
            self._changed.set()
        except (ServerDown, DeadlineError) as error:
            self._down(replica, str(error))
        except InfrastructureError as error:  # busy machines answer late: only its requests may fail on that
            log.warning("%s", error)

    async def _over_all(self, act: Callable[[Replica], Awaitable[None]]) -> None:
        async def one(replica: Replica) -> None:
            await act(replica)

        try:
            async with asyncio.TaskGroup() as group:
                for replica in self.replicas:
                    group.create_task(one(replica))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _down(self, replica: Replica, reason: str) -> None:
        replica.reason = reason
        if replica.ready:
            replica.ready, replica.label = False, None
            replica.lost += 1
            self._tell(f"server down: {reason}")

    def _tell(self, line: str) -> None:
        log.warning("%s", line)
        self._say(line)

    def _reasons(self) -> str:
        return "; ".join(
            r.reason if r.server.url in r.reason else f"{r.server.url}: {r.reason}" for r in self.replicas
        )

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        for replica in self.replicas:
            replica.ready, replica.reason = False, "closed"
            await replica.server.close()


async def _lives(server: VllmClient) -> bool:
    """After a failure: false where it was the server's end, and not this one request's."""
    try:
        await server.healthy()
    except ServerDown:
        return False
    except InfrastructureError:  # late, but there
        return True
    return True
