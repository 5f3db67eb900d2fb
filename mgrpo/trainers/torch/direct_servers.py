"""How the trainer's rank 0 controls the servers that it sends weights to: HTTP, in an event loop on its own thread.

    /pause -> mgrpo_direct_begin -> a mgrpo_direct_receive for each bucket -> mgrpo_direct_finish
    -> /reset_prefix_cache -> /update_weight_version -> /resume

Between versions every server is looked at, so that one that came back, or missed a version, gets the newest.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from mgrpo.config.engine import OnUpdate
from mgrpo.engines.labels import Label
from mgrpo.engines.vllm.client import VllmClient
from mgrpo.engines.vllm.plugin_client import NoPluginError, first_answer
from mgrpo.engines.vllm.weight_sync import is_paused, pause, relabel_and_resume, server_label
from mgrpo.errors import ConfigError, InfrastructureError

WATCH_SECONDS = 2.0
REST_SECONDS = 60.0  # the longest time for which a server whose updates fail gets none
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class DirectServer:
    """One server as the trainer knows it."""

    client: VllmClient
    workers: int = 0
    given: Label | None = None  # what we gave it last
    met: bool = False  # its workers have connections with our ranks
    meetings: int = 0
    answered: bool = False  # at least once
    failures: int = 0  # updates in a row
    rest_until: float = 0.0
    seen: tuple[Label | None, bool] | None = None  # label and whether it is paused; None: it did not answer
    seen_at: float = 0.0

    @property
    def url(self) -> str:
        return self.client.url


class DirectServers:
    """All servers of one policy. Its methods are for the trainer's main thread but for coroutines, which run() and
    start() take to the loop."""

    def __init__(
        self, urls: Sequence[str], timeout: float, on_update: OnUpdate, watch: float = WATCH_SECONDS
    ) -> None:
        """timeout: seconds of one call. watch: between two looks at each server."""
        if not urls:
            raise ConfigError("weights are to go straight to servers, and no server is known")
        self.timeout, self._on_update, self._watch_seconds = timeout, on_update, watch
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mgrpo-servers", daemon=True)
        self._thread.start()
        self.servers = self.run(self._clients(urls))
        self._watching = self.start(self._watch())

    async def _clients(self, urls: Sequence[str]) -> list[DirectServer]:
        return [DirectServer(VllmClient(url, self.timeout)) for url in urls]

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.start(coroutine).result()

    def close(self) -> None:
        """Idempotent."""
        if self._loop.is_closed():
            return
        self._watching.cancel()
        self.run(self._close_clients())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close_clients(self) -> None:
        for server in self.servers:
            await server.client.close()

    # -- an update -----------------------------------------------------------------------------------------------

    async def prepare(self, server: DirectServer, label: Label, dtype: str) -> None:
        """Make sure that it can take `label` in `dtype`, and pause it. Raises ConfigError where it never can."""
        client = server.client
        await client.healthy()
        current = await server_label(client, self._on_update)
        server.answered = True
        if current is None or current != server.given:  # new, or started again
            server.met = False
        try:
            found = await first_answer(client, lambda: self.call(server, "info"))
        except NoPluginError as error:
            raise ConfigError(str(error)) from None
        for number, info in enumerate(found):
            if info["dtype"] != dtype:
                raise ConfigError(
                    f"{server.url}: worker {number} computes in {info['dtype']}, engine.dtype is {dtype}"
                )
        if len(found) != server.workers:
            server.workers, server.met = len(found), False
        await pause(client, label, self._on_update)

    async def call(self, server: DirectServer, step: str, **arguments: object) -> list[dict[str, Any]]:
        """What each worker answers to mgrpo_direct_<step>. Raises InfrastructureError naming server, worker and
        step."""
        body = {"method": f"mgrpo_direct_{step}", "kwargs": arguments, "timeout": self.timeout}
        answer = await server.client.post("/collective_rpc", body)
        results = answer["results"] if isinstance(answer, dict) else []
        for number, result in enumerate(results):
            if not isinstance(result, dict) or "error" in result:
                reason = result["error"] if isinstance(result, dict) else repr(result)
                raise InfrastructureError(f"{server.url}: worker {number}, {step}: {reason}")
        return list(results)

    async def finish(self, server: DirectServer, label: Label) -> None:
        """All buckets have arrived: label the weights, and let the server go on."""
        await self.call(server, "finish")
        await relabel_and_resume(server.client, label, self._on_update)
        server.given, server.met = label, True
        server.seen, server.seen_at = (label, False), time.monotonic()

    # -- between updates -----------------------------------------------------------------------------------------

    def lacking(self, label: Label, since: float) -> list[DirectServer]:
        """Servers that, as seen later than `since` (monotonic), answer and do not serve `label`."""
        now = time.monotonic()
        return [
            server
            for server in self.servers
            if server.seen is not None
            and server.seen != (label, False)
            and server.seen_at > since
            and now >= server.rest_until
        ]

    async def _watch(self) -> None:
        while True:
            await asyncio.gather(*(self._look(server) for server in self.servers))
            await asyncio.sleep(self._watch_seconds)

    async def _look(self, server: DirectServer) -> None:
        began = time.monotonic()
        try:
            await server.client.healthy()
            label = await server_label(server.client, self._on_update)
            server.seen = label, await is_paused(server.client)
            server.answered = True
        except (InfrastructureError, ValueError):
            server.seen = None
        server.seen_at = began


async def outcome(work: Awaitable[object]) -> str:
    """ "" where it went well, else the reason why it did not. ConfigError and ValueError, which no later try will mend,
    are raised."""
    try:
        await work
    except InfrastructureError as error:
        return str(error)
    return ""
