"""uvicorn for the gateway: on a running loop that is not its own, with a bound on connections and on their patience.

A connection waits for its peer while a request is arriving, and while an answer is not read. One look at all of them
every few seconds finds those that have been waiting for too long; they are cut off, whatever the peer does meanwhile: a
byte now and then is no sign of life. How long an engine samples does not matter here.

The protocol is uvicorn's own over h11, also where others are installed: its fields are what is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_CONNECTIONS = 4096 if _FILES == resource.RLIM_INFINITY else min(4096, _FILES // 2)
"""Open at the same time. One more closes the one that has been idle for longest."""

BACKLOG = 256
"""Connections that wait to be accepted."""


class State(ServerState):
    """What the connections of a server share. idle: those that answer no request, who has been so for longest first."""

    def __init__(self) -> None:
        super().__init__()
        self.idle: dict[Connection, None] = {}


class Connection(H11Protocol):
    """One connection, with what it waits for."""

    server_state: State
    _answered = 0
    _waits: tuple[str, int] = ("request", 0)
    _since = 0.0  # the loop's time; when it began to wait for that

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        idle, self._since = self.server_state.idle, self.loop.time()
        idle[self] = None
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = next(iter(idle))  # this one, where all others are being answered
            del idle[oldest]
            self.connections.discard(oldest)  # which it does itself only when the loop comes to it
            oldest.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle():
            self.server_state.idle.pop(self, None)

    def on_response_complete(self) -> None:
        self._answered += 1
        self._waits, self._since = ("request", self._answered), self.loop.time()
        super().on_response_complete()  # which may begin the next request, where that has arrived already
        if self.is_idle():
            self.server_state.idle[self] = None

    def is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def abort(self) -> None:
        """Cut it off, with what was not read."""
        self.transport.abort()

    def check(self, now: float, patience: float) -> None:
        """Cut it off if it has waited longer for its peer than `patience` seconds, at the loop's time `now`."""
        waits = (self._waiting_for(), self._answered)
        if waits != self._waits:
            self._waits, self._since = waits, now
        elif waits[0] and now - self._since > patience:
            self.abort()

    def _waiting_for(self) -> str:
        """ "" while it is our turn."""
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            return "reading"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        return "request" if self.is_idle() else ""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.server_state: State = State()
        self.ready = asyncio.Event()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Take no more connections, and end once those that are there have ended."""
        self.should_exit = True
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        await self._stop.wait()  # where uvicorn looks ten times a second

    async def shutdown(self, sockets: Any = None) -> None:
        """End once every connection and request has; abort_all() sees to that. uvicorn's own waits in tenths."""
        loop = asyncio.get_running_loop()
        for server in self.servers:  # asyncio leaves a connection open that was accepted as its server closed
            for listening in server.sockets:
                loop.remove_reader(listening.fileno())
        for _ in range(4):  # turns of the loop until what was accepted is among the connections
            await asyncio.sleep(0)
        for closing in (*self.servers, *(sockets or ())):
            closing.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        while state.connections or state.tasks:
            await asyncio.sleep(0.005)
        for server in self.servers:
            await server.wait_closed()

    async def watch(self, patience: float) -> None:
        """Cut off who makes us wait for more than `patience` seconds. Runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(5.0, patience / 8))
            self.look(loop.time(), patience)

    def look(self, now: float, patience: float) -> None:
        """One look at all connections at the loop's time `now`."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.check(now, patience)

    def abort_all(self) -> None:
        """Cut off every connection."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.abort()


def server_of(application: Any, patience: float) -> Server:
    """A server for an ASGI application; start it with serve(sockets=[...])."""
    return Server(
        uvicorn.Config(
            application,
            http=Connection,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what hostile peers send is no matter of ours; the application logs its own errors
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=max(1, round(patience)),
        )
    )
