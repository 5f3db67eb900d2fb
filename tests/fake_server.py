"""What the fake vLLM and SGLang share: HTTP on a Unix socket, in this event loop, and a policy that is a hash.

A route is a method `on_<path>` that takes the body and the query and returns JSON, or (status, JSON).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from mgrpo.model.routers import Routing

VOCAB = 50


def token(weights: bytes, prompt: list[int], seed: int, i: int) -> int:
    text = f"{prompt} {seed} {i}".encode()
    return hashlib.sha256(weights + text).digest()[0] % VOCAB


def words(ids: Sequence[int]) -> str:
    """The text of ids, as tests.models.tiny_tokenizer decodes them."""
    return " ".join(f"w{i}" for i in ids)


def logprob(weights: bytes, prompt: list[int] | tuple[int, ...]) -> float:
    """Of what follows the prompt."""
    return -0.1 - hashlib.sha256(weights + f"{list(prompt)}".encode()).digest()[0] / 50


ROUTING = Routing(layers=4, places=(1, 3), experts=6, chosen=2)
"""Of the mixture of experts that a server with `routes` serves: two of its layers are dense."""


def experts_by(weights: bytes, ids: Sequence[int]) -> list[list[int]]:
    """(layers, k) that the last of the ids is sent to, given those before it; zeros in dense layers."""
    drawn = hashlib.sha256(weights + f"routes {list(ids)}".encode()).digest()
    first = [
        drawn[layer] % ROUTING.experts if layer in ROUTING.places else 0 for layer in range(ROUTING.layers)
    ]
    return [
        [i, (i + 1 + drawn[9] % 5) % ROUTING.experts] if layer in ROUTING.places else [0, 0]
        for layer, i in enumerate(first)
    ]


class Routes:
    """Experts of a request's tokens, each by the weights that it was input to."""

    def __init__(self) -> None:
        self._rows: list[list[list[int]]] = []

    def feed(self, weights: bytes, ids: Sequence[int]) -> None:
        """All of ids are input by now."""
        for n in range(len(self._rows), len(ids)):
            self._rows.append(experts_by(weights, ids[: n + 1]))

    def since(self, start: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(tokens, layers, k)."""
        return np.asarray(self._rows[start:]).reshape(-1, ROUTING.layers, ROUTING.chosen)


class FakeServer:
    """`async with FakeServer(socket) as server`; `stop` and `start` are a kill and a start with weights of its own."""

    generate_path: ClassVar[str]
    unrecorded: ClassVar[tuple[str, ...]]
    """Routes that are called all the time, and not listed in `calls`."""

    def __init__(self, socket: Path, *, max_length: int = 64, raw_logprobs: bool = False) -> None:
        self.socket, self.url = socket, f"unix://{socket}"
        self.max_length, self.raw_logprobs = max_length, raw_logprobs
        self.calls: list[str] = []  # paths in order of arrival
        self.bodies: list[dict[str, Any]] = []  # of generations
        self.hold = asyncio.Event()  # clear: generations stand still
        self.hold.set()
        self.hold_at: int | None = None  # only when they have so many tokens
        self.standing = False  # one of them does
        self.heeds_stops = True  # it ends at stop texts
        self.refuse: dict[str, tuple[int, str]] = {}  # path -> status and message
        self.aborted = 0  # generations whose client went away
        self.routes = False  # it was started to report the experts of each token
        self.spoil: Callable[[str], Any] = lambda text: text  # what becomes of that report
        self.weights, self.label = b"its own", "default"
        self._forget()

    def _forget(self) -> None:
        """Everything that a killed server loses."""
        self.weights, self.label = b"its own", "default"
        self.running = asyncio.Event()
        self.running.set()
        self.clean = True  # the prefix cache holds nothing of older weights

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._forget()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_unix_server(self._connected, str(self.socket))

    async def stop(self) -> None:
        """As kill -9: every connection ends at once."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.socket.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                headers = {}
                while (header := await reader.readline()) != b"\r\n":
                    name, _, value = header.decode().partition(":")
                    headers[name.strip().lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, answer = await self._answer(path, json.loads(body) if body else {}, reader)
                data = json.dumps(answer).encode()
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()  # killed
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], reader: asyncio.StreamReader) -> tuple[int, Any]:
        path, _, query = path.partition("?")
        if path not in self.unrecorded:
            self.calls.append(path)
        if path in self.refuse:
            status, message = self.refuse[path]
            return status, {"error": {"message": message}}
        if path == self.generate_path:
            return await self._generate(body, reader)
        route = getattr(self, "on_" + path.strip("/").replace("/", "_"), None)
        if route is None:
            return 404, {"detail": "Not Found"}
        answer = route(body, query)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer if isinstance(answer, tuple) else (200, answer)

    async def _generate(self, body: dict[str, Any], reader: asyncio.StreamReader) -> tuple[int, Any]:
        raise NotImplementedError

    def count(self) -> Counter[str]:
        return Counter(self.calls)
