"""What the tests of the gateway's server share: a rollout whose turns are written by the test, behind a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx2

from mgrpo.gateway.connections import Server
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.server import Extra, Gateway
from mgrpo.gateway.turn import ToolCall, TurnReply, TurnRequest

CALL = ToolCall("call00001", "find", '{"query": "Suva"}')
TOOL = {
    "name": "find",
    "description": "Finds.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
WORDS = "Suva is the capital of Fiji. \u2028 ünï"


def reply(**changes: Any) -> TurnReply:
    """A turn of three tokens."""
    told: dict[str, Any] = {
        "id": "r1",
        "role": "main",
        "invocation": 0,
        "content": WORDS,
        "reasoning": "",
        "tool_calls": (),
        "finish_reason": "stop",
        "prompt_tokens": 7,
        "token_ids": (83, 117, 33),
        "logprobs": (-0.5, -0.25, -1.0),
    }
    return TurnReply(**told | changes)


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


@dataclass
class FakeRollout:
    """Answers with `script`; while `open` is not set, its turns are being sampled."""

    script: Callable[[TurnRequest], TurnReply] = lambda request: reply(role=request.role)
    id: str = "abc"
    token: str = "secret"
    roles: tuple[str, ...] = ("main", "sub")
    refuses: bool = False
    asked: list[TurnRequest] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    rewarded: list[tuple[str, int, str, float]] = field(default_factory=list)
    cancelled: int = 0

    def __post_init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()

    async def turn(self, request: TurnRequest) -> TurnReply:
        self.asked.append(request)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.script(request)

    def overridden(self, names: Sequence[str]) -> None:
        if self.refuses:
            raise GatewayError(400, "unsupported_setting", ", ".join(names))
        self.settings += names

    def reward(self, role: str, invocation: int, name: str, value: float) -> None:
        if role not in self.roles:
            raise GatewayError(404, "invocation_not_found", role)
        self.rewarded.append((role, invocation, name, value))

    def conversations(self) -> Mapping[tuple[str, int], Any]:
        return {("main", 0): SimpleNamespace(agent=SimpleNamespace(tokenizer=Letters()))}


@dataclass
class Served:
    """A gateway with its rollout; requests carry the rollout's token."""

    gateway: Gateway
    rollout: Any
    base: str
    http: httpx2.AsyncClient

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """To a path below the base URL; `_` of a header's name stands for a dash."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return await self.http.post(f"{self.base}/{path}", json=body, headers=named)

    @property
    def server(self) -> Server:
        """That is running."""
        assert self.gateway._server is not None
        return self.gateway._server

    def pass_time(self, seconds: float) -> None:
        """Let the server see its connections as if so many seconds from now had passed."""
        self.server.look(asyncio.get_running_loop().time() + seconds, self.gateway.options.idle_seconds)

    async def events(self, path: str, body: Any) -> list[tuple[str | None, Any]]:
        """(name, data) of each event of a stream, which ends as streams end."""
        answer = await self.post(path, body | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.content)


def events(raw: bytes) -> list[tuple[str | None, Any]]:
    """(name, data) of each event; data "[DONE]" as it is."""
    found = []
    assert raw.endswith(b"\n\n")
    for block in raw.split(b"\n\n")[:-1]:
        lines = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":"))
        if b"data" in lines:
            data, name = lines[b"data"], lines.get(b"event")
            found.append((name and name.decode(), "[DONE]" if data == b"[DONE]" else json.loads(data)))
    return found


@asynccontextmanager
async def served(rollout: Any = None, extra: Extra | None = None, **options: Any) -> AsyncIterator[Served]:
    """A gateway with one rollout; when it has closed, no task and no connection is left."""
    rollout = rollout or FakeRollout()
    before = asyncio.all_tasks()
    gateway = Gateway(GatewayOptions(**options), extra)
    await gateway.start()
    server = gateway._server
    assert server is not None
    try:
        base = gateway.open(rollout)
        headers = {"Authorization": f"Bearer {rollout.token}"}
        async with httpx2.AsyncClient(headers=headers, timeout=30.0, verify=False) as http:
            yield Served(gateway, rollout, base, http)
    finally:
        await gateway.close()
        assert not server.server_state.connections and not server.server_state.tasks
        await until(lambda: not asyncio.all_tasks() - before - {asyncio.current_task()})


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition; AssertionError when it is not met in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.002)


def run(test: Coroutine[Any, Any, None]) -> None:
    """A test of its own loop, with a bound on its time."""

    async def bounded() -> None:
        async with asyncio.timeout(60.0):
            await test

    asyncio.run(bounded())
