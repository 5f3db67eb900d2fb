"""A service on a real socket of this machine that answers as it is told: for tests of clients, breakers and runs.

    with FakeService({"hits": []}) as service:      # what it answers, or a function of the request
        service.faults += ["503", "cut"]            # of the next two requests, in order
        service.down = "503"                        # of every request until it is None again
        service.refuse() ... service.listen()       # connections are refused, on the same port
        service.requests                            # what came, in order

It speaks just enough HTTP/1.1, one request a connection, so that it can break off wherever a test wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SLOW_SECONDS = 30.0  # longer than any test's timeout; cut short when the service is closed
FAULTS = (
    *("429", "429-date", "408", "500", "503", "504", "401", "402", "403", "404", "400"),
    *("slow", "cut", "drop", "reset", "shape", "html", "empty"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it came."""

    method: str
    path: str  # decoded, without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Raw:
    """An answer that is no JSON, or has a status or headers of its own."""

    body: bytes | str = b""
    status: int = 200
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


class FakeService:
    """Use as a context manager. answer: a JSON value, a Raw, or a function of Asked that gives one. Every attribute may
    be set while it serves."""

    def __init__(self, answer: object = None, *, retry_after: str = "0") -> None:
        """retry_after: what 429 and 503 ask for, in seconds."""
        self.answer: object = {} if answer is None else answer
        self.faults: deque[str] = deque()
        self.down: str | None = None
        self.fault_of: Callable[[Asked], str | None] = lambda asked: None
        self.requests: list[Asked] = []
        self.retry_after = retry_after
        self.open = self.most_open = 0  # requests under way
        self._loop = asyncio.new_event_loop()
        self._port = 0
        self._closing: asyncio.Event | None = None
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._run, name="fake-service", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FakeService:
        self._thread.start()
        self._call(self._begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def refuse(self) -> None:
        """Take no connections from now on."""
        self._call(self._stop_listening())

    def listen(self) -> None:
        """Take connections again, on the same port."""
        self._call(self._start_listening())

    # -- on its own thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _begin(self) -> None:
        self._closing = asyncio.Event()
        await self._start_listening()

    async def _end(self) -> None:
        assert self._closing is not None
        self._closing.set()
        await self._stop_listening()
        me = asyncio.current_task()
        if left := [task for task in asyncio.all_tasks() if task is not me]:
            await asyncio.wait(left, timeout=5.0)

    async def _start_listening(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await _read(reader)
            self.requests.append(asked)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            try:
                await self._respond(asked, writer)
            finally:
                self.open -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, which some tests want
        finally:
            writer.close()

    async def _respond(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        fault = self.fault_of(asked) or self.down or (self.faults.popleft() if self.faults else None)
        if fault == "slow":
            assert self._closing is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), SLOW_SECONDS)
        if fault == "reset":
            writer.transport.abort()
            return
        raw = self._raw(asked) if fault in (None, "slow", "cut", "drop") else self._faulty(fault)
        body = raw.body.encode() if isinstance(raw.body, str) else raw.body
        length = len(body)
        if fault == "cut":
            body = body[: length // 2]
            length = len(body)
        elif fault == "drop":  # the connection ends before the body does
            body = body[: length // 2]
        head = [f"HTTP/1.1 {raw.status} Some words", f"content-type: {raw.kind}", f"content-length: {length}"]
        head += [f"{name}: {value}" for name, value in raw.headers.items()]
        writer.write("\r\n".join([*head, "connection: close", "", ""]).encode() + body)
        await writer.drain()

    def _raw(self, asked: Asked) -> Raw:
        answer = self.answer(asked) if callable(self.answer) else self.answer
        return answer if isinstance(answer, Raw) else Raw(json.dumps(answer))

    def _faulty(self, fault: str) -> Raw:
        if fault == "html":
            return Raw("<!DOCTYPE html><html><body>FAULT: 502 Bad gateway</body></html>", 200, "text/html")
        if fault == "empty":
            return Raw(b"")
        if fault == "shape":
            return Raw('{"FAULT": [1, 2, 3]}')
        status, _, form = fault.partition("-")
        headers = {}
        if status in ("429", "503"):
            headers["retry-after"] = self.retry_after
        if form == "date":
            at = time.time() + float(self.retry_after)
            headers["retry-after"] = email.utils.formatdate(at, usegmt=True)
        return Raw(
            json.dumps({"error": {"message": f"FAULT {status} of the service"}}), int(status), headers=headers
        )


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ", 2)
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    parts = urlsplit(target)
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    return Asked(method, unquote(parts.path), query, headers, body)
