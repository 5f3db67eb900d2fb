"""Several servers of one policy behind one call: routing, health, removal, return.

    ready   answers requests
    down    asked nothing; looked at every WATCH_SECONDS until it is ready again

A request goes to the ready server with the fewest in flight. A conversation stays with its server, whose prefix cache
knows it (session affinity), unless that one has LOAD_IMBALANCE requests more than the least loaded. A server that
cannot be reached, broke off or answers with weights older than the newest version goes down at once, by name, and its
request is sent to another: what an unfinished answer held is thrown away, so nothing is lost or doubled. A server
returns only after it has been updated to the newest version.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

from mgrpo.engines.client import Completion, ServerClient, ServerDown, ServerInfo
from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.weight_sync import C, Unconfirmed, WeightSync
from mgrpo.errors import ConfigError, CorruptionError, DeadlineError, InfrastructureError

T = TypeVar("T")
log = logging.getLogger("mgrpo.engines")

WATCH_SECONDS = 2.0
LOAD_IMBALANCE = 8  # requests that a conversation's own server may have more than the least loaded
JOIN_SECONDS = 20.0  # once one server is ready, how long the first update waits for the others
REPORT_SECONDS = 30.0  # between two lines about a wait
SESSIONS = 65536  # conversations whose server is remembered


@dataclass(slots=True, eq=False)
class PooledServer(Generic[C]):
    """One server as the pool knows it."""

    client: C
    ready: bool = False
    reason: str = "not asked yet"  # why it is down
    info: ServerInfo | None = None
    label: Label | None = None  # what it served when we last looked
    in_flight: int = 0
    failures: int = 0  # times it went down


class EnginePool(Generic[C]):
    """The servers of one policy. Use from one event loop; `close` ends the connections, not the servers."""

    def __init__(
        self,
        clients: Sequence[C],
        sync: WeightSync[C],
        *,
        timeout: float,
        max_length: int,
        on_event: Callable[[str], None] | None = None,
        watch: float = WATCH_SECONDS,
    ) -> None:
        """timeout: seconds that a request waits for a ready server. max_length: tokens that each must take.
        on_event: takes a line for people about each server that goes down or comes back. watch: seconds between two
        looks at each."""
        if not clients:
            raise ConfigError("no server is named: urls is empty")
        self.servers = [PooledServer(client) for client in clients]
        self.wanted: Label | None = None
        self._sync, self._timeout, self._max_length = sync, timeout, max_length
        self._on_event, self._watch_seconds = on_event or (lambda line: None), watch
        self.waiting = 0  # requests that no server has yet
        self._affinity: dict[str, PooledServer[C]] = {}  # session -> its server
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def temperatures(self) -> tuple[float, float]:
        """Lowest and highest that its servers sample at, beside 0."""
        return self.servers[0].client.temperatures

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self, request: Callable[[C, str], Awaitable[Completion]], session: str | None
    ) -> tuple[Completion, Label]:
        """The answer of some server to `request`, and the version that was asked for or newer.

        request: sends it, to (server, name of the model to ask for). Raises what it raises; InfrastructureError naming
        every server when none is ready within timeout seconds.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            self.waiting += 1
            try:
                server = await self._acquire(session, deadline)
            finally:
                self.waiting -= 1
            wanted = self.wanted
            assert wanted is not None and server.info is not None and server.label is not None
            label = max(wanted, server.label)
            server.in_flight += 1
            failures = server.failures
            try:
                answer = await request(server.client, self._sync.model_name(server.info.model, label))
                await self._check_labels(server, answer, wanted)
                return answer, label
            except Unconfirmed as error:  # nobody can say any more what it was sampled by
                log.warning("%s", error)
                if time.monotonic() >= deadline:
                    raise
            except InfrastructureError as error:
                if not isinstance(error, ServerDown) and await _lives(server.client):
                    raise
                if server.failures == failures:  # the first of its requests to notice
                    self._down(server, str(error))
                if time.monotonic() >= deadline:
                    raise
            finally:
                server.in_flight -= 1

    async def ask(self, request: Callable[[C], Awaitable[T]]) -> T:
        """The answer of some ready server to a question that has nothing to do with its weights. Raises what `request`
        raises; InfrastructureError naming every server when none is ready within timeout seconds."""
        deadline = time.monotonic() + self._timeout
        while True:
            server = await self._acquire(None, deadline)
            failures = server.failures
            try:
                return await request(server.client)
            except ServerDown as error:
                if server.failures == failures:
                    self._down(server, str(error))
                if time.monotonic() >= deadline:
                    raise

    async def _check_labels(self, server: PooledServer[C], answer: Completion, wanted: Label) -> None:
        """An answer counts once the weights of each of its tokens have been compared with the trainer's."""
        if not self._sync.labels_tokens:
            return
        if not answer.spans:
            client = server.client
            raise ConfigError(f"{client.url}: no weight versions in its answer; {client.versions_hint}")
        for span in answer.spans:
            label = parse_label(span.label)
            if label is None or label.role != wanted.role or label < wanted:
                raise ServerDown(
                    f"{server.client.url}: answered with weights {span.label!r}, expected {wanted}"
                )
            await self._sync.confirm(server.client, label)

    async def _acquire(self, session: str | None, deadline: float) -> PooledServer[C]:
        while True:
            self._watch()
            if server := self._choose(session):
                return server
            if self.wanted is None:
                raise InfrastructureError("no weights were loaded yet")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, min(1.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline and not self._choose(session):
                raise InfrastructureError(f"no server ready within {self._timeout:g} s: {self._reasons()}")

    def _choose(self, session: str | None) -> PooledServer[C] | None:
        wanted = self.wanted
        ready = [s for s in self.servers if s.ready and wanted is not None and s.label and s.label >= wanted]
        if not ready:
            return None
        least = min(ready, key=lambda s: s.in_flight)  # the first of equals
        if session is None:
            return least
        own = self._affinity.get(session, least)
        if own not in ready or own.in_flight > least.in_flight + LOAD_IMBALANCE:
            own = least
        self._affinity[session] = own
        if len(self._affinity) > SESSIONS:
            del self._affinity[next(iter(self._affinity))]
        return own

    def forget(self, session: str) -> None:
        """The conversation has ended."""
        self._affinity.pop(session, None)

    # -- versions ------------------------------------------------------------------------------------------------

    async def update(self, label: Label, patience: float) -> Label:
        """Make all servers serve a prepared version; the oldest version that one of them serves now.

        Servers that cannot be reached go down and get it when they return. Waits up to `patience` seconds for a first
        server, then raises InfrastructureError naming all. Raises ConfigError where one can never serve this policy,
        ValueError where it refuses a request of the update.
        """
        self.wanted = label
        began = reported = time.monotonic()
        first = None  # when the first was ready
        while True:
            await self._over_all(self._ensure_version)
            ready = [s for s in self.servers if s.ready]
            now = time.monotonic()
            first = first if first is not None or not ready else now
            if len(ready) == len(self.servers) or (first is not None and now - first >= self._join_seconds()):
                self._watch()
                return min(s.label for s in ready if s.label is not None)
            if now - began > patience:
                raise InfrastructureError(
                    f"no server took weights {label} within {patience:g} s: {self._reasons()}"
                )
            if now - reported > REPORT_SECONDS:
                reported = now
                self._report(f"waiting for servers: {self._reasons()}")
            await asyncio.sleep(min(self._watch_seconds, 0.2 + (now - began) / 4))

    def _join_seconds(self) -> float:
        """Seconds to wait for the rest; only for servers that have never been ready."""
        return JOIN_SECONDS if any(s.info is None for s in self.servers) else 0.0

    async def _ensure_version(self, server: PooledServer[C]) -> None:
        """Make one server ready with the wanted version, or leave it down with the reason."""
        wanted = self.wanted
        if wanted is None or (server.ready and server.label is not None and server.label >= wanted):
            return
        try:
            if not server.ready:
                await self._examine(server)
            server.label = await self._sync.ensure_version(server.client, wanted)
        except (InfrastructureError, DeadlineError) as error:
            self._down(server, str(error))
            return
        if server.label < (self.wanted or wanted):  # a newer one was asked for meanwhile
            return
        if not server.ready:
            server.ready = True
            if server.failures:
                self._report(f"{server.client.url} is back, with weights {server.label}")
        self._changed.set()

    async def _examine(self, server: PooledServer[C]) -> None:
        """A server that starts to serve, or comes back. Raises ConfigError when it can never serve this policy."""
        client = server.client
        await client.healthy()
        info = await client.info()
        if info.max_length < self._max_length:
            raise ConfigError(
                f"{client.url}: takes {info.max_length} tokens ({client.length_setting}), "
                f"max_length is {self._max_length}"
            )
        new = server.info is None and not await self._sync.paused(client)  # a paused server answers nothing
        if new and not await client.logprobs_follow_temperature(info.model):
            raise ConfigError(
                f"{client.url}: reports log-probs of another distribution than it samples from; {client.logprobs_hint}"
            )
        if new and client.routing is not None and not await client.reports_routing(info.model):
            raise ConfigError(client.no_routing())
        server.info = info

    # -- health --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Keep the watcher running; what it died of is raised here, in a caller of the pool."""
        if self._watcher is not None and self._watcher.done():
            watcher, self._watcher = self._watcher, None
            watcher.result()
        if self._watcher is None:
            # A context of its own: it watches for all rollouts and must not end with the one that asked first.
            self._watcher = asyncio.get_running_loop().create_task(self._watch_all(), context=Context())

    async def _watch_all(self) -> None:
        while True:
            await asyncio.sleep(self._watch_seconds)
            await self._over_all(self._look)

    async def _look(self, server: PooledServer[C]) -> None:
        try:
            if not server.ready:
                await self._ensure_version(server)
                return
            await server.client.healthy()
            current = await self._sync.current_version(server.client)
            if current is None:
                raise ServerDown(f"{server.client.url}: serves weights of its own, {self.wanted} is expected")
            wanted = max(current, self.wanted or current)
            # An update that is under way ends first; one whose worker has died is made again.
            if current < wanted or await self._sync.paused(server.client):
                current = await self._sync.ensure_version(server.client, wanted)
            await self._sync.confirm(server.client, current)  # of another worker's update, too
            server.label = current
            self._changed.set()
        except (ServerDown, DeadlineError, CorruptionError) as error:  # the last: what comes next is whole
            self._down(server, str(error))
        except InfrastructureError as error:  # busy machines answer late: only its requests may fail on that
            log.warning("%s", error)

    async def _over_all(self, act: Callable[[PooledServer[C]], Awaitable[None]]) -> None:
        async def one(server: PooledServer[C]) -> None:
            await act(server)

        try:
            async with asyncio.TaskGroup() as group:
                for server in self.servers:
                    group.create_task(one(server))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _down(self, server: PooledServer[C], reason: str) -> None:
        server.reason = reason
        self._sync.forget(server.client)
        if server.ready:
            server.ready, server.label = False, None
            server.failures += 1
            self._report(f"server down: {reason}")

    def _report(self, line: str) -> None:
        log.warning("%s", line)
        self._on_event(line)

    def _reasons(self) -> str:
        return "; ".join(
            s.reason if s.client.url in s.reason else f"{s.client.url}: {s.reason}" for s in self.servers
        )

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        for server in self.servers:
            server.ready, server.reason = False, "closed"
            await server.client.close()


async def _lives(client: ServerClient) -> bool:
    """After a failure: false where it was the server's end, and not this one request's."""
    try:
        await client.healthy()
    except ServerDown:
        return False
    except InfrastructureError:  # late, but there
        return True
    return True
