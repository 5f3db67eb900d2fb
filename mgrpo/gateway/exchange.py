"""One request and its answer over ASGI, and the way of one turn through them.

    converse: JSON --dialect--> Wanted --Seat.play--> task of the rollout --> TurnReply --dialect--> JSON or events

A peer that goes away takes its question back, and the rollout is told by its call of turn() being cancelled. The turn
itself is a task of the rollout's: it goes on to its end, and when an SDK asks again, it gets what was sampled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from mgrpo.environments.episode import Conversation
from mgrpo.gateway.dialect import Asked, Decode, Dialect, Wanted
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.fields import Table
from mgrpo.gateway.kept import Kept
from mgrpo.gateway.sse import KEEP_ALIVE, dumps
from mgrpo.gateway.turn import TurnReply, TurnRequest
from mgrpo.model.tokens import decode_piece

KEEP_ALIVE_SECONDS = 5.0
"""Between two comments of a stream whose turn is being sampled; no stream begins earlier, so that what is refused at
once has its status."""
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Rollout(Protocol):
    """What the server asks of a GatewayRollout (rollout.py), which says what each of these does."""

    id: str
    token: str

    @property
    def roles(self) -> Sequence[str]: ...

    async def turn(self, request: TurnRequest) -> TurnReply: ...

    def overridden(self, names: Sequence[str]) -> None: ...

    def reward(self, role: str, invocation: int, name: str, value: float) -> None: ...

    def conversations(self) -> Mapping[tuple[str, int], Conversation]: ...


class PeerGoneError(Exception):
    """Nobody is there any more to answer."""


class Exchange:
    """One request, and the answer that it gets. path: as it came, nothing of it decoded. begun: the answer's status was
    sent."""

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["raw_path"].decode("latin-1")
        self._headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self._receive, self._send = receive, send
        self.begun = False

    def header(self, name: bytes) -> str | None:
        """The first header of a name (in lower case)."""
        return next((value.decode("latin-1") for key, value in self._headers if key == name), None)

    def length(self) -> int | None:
        """The body's length in bytes, as declared."""
        value = self.header(b"content-length")
        return int(value) if value and value.isdigit() else None

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises PeerGoneError when the peer goes away."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise PeerGoneError
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]

    async def gone(self) -> None:
        """Ends when the peer has gone away; once the body is here."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(
        self, status: int, body: Mapping[str, object], headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """JSON, whole."""
        data = dumps(body)
        await self._begin(status, b"application/json", (*headers, (b"content-length", b"%d" % len(data))))
        await self._send({"type": "http.response.body", "body": data})

    async def stream(self) -> None:
        """Begin a stream of events."""
        through = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # for proxies between us
        await self._begin(200, b"text/event-stream; charset=utf-8", through)

    async def events(self, data: bytes, *, more: bool = True) -> None:
        """Events of a stream that has begun. more: it goes on."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _begin(self, status: int, kind: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.begun = True
        plain = ((b"content-type", kind), (b"x-content-type-options", b"nosniff"))
        await self._send({"type": "http.response.start", "status": status, "headers": [*plain, *headers]})


class Seat:
    """A rollout as the server sees it. requests: of it that are arriving or being answered."""

    def __init__(self, rollout: Rollout, replies: int, characters: int) -> None:
        """replies, characters: that it may keep for later requests."""
        self.rollout = rollout
        self.requests = 0
        self._room = replies, characters
        self._kept: Kept | None = None
        self._turns: set[asyncio.Task[TurnReply]] = set()

    @property
    def kept(self) -> Kept:
        """Made when it is first asked for: most programs speak another dialect."""
        if self._kept is None:
            self._kept = Kept(*self._room)
        return self._kept

    def play(self, wanted: Wanted) -> asyncio.Task[TurnReply]:
        """Ask the rollout for a turn. Cancelling the task takes back the question only: the turn goes on."""

        async def turn() -> TurnReply:
            reply = await self.rollout.turn(wanted.turn)
            wanted.played(reply)
            return reply

        task = asyncio.create_task(turn())
        self._turns.add(task)
        task.add_done_callback(self._ended)
        return task

    def cancel(self) -> None:
        """Whoever waits for a turn gets none."""
        for task in list(self._turns):
            task.cancel("the rollout is over")

    def _ended(self, task: asyncio.Task[TurnReply]) -> None:
        self._turns.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved, also where nobody waits for it any more


async def converse(exchange: Exchange, seat: Seat, dialect: Dialect, body: Table, asked: Asked) -> None:
    """Play the turn that a request asks for, and answer it. Raises GatewayError where nothing was answered yet."""
    wanted = dialect.read(body, asked)
    if wanted.overridden:
        seat.rollout.overridden(wanted.overridden)
    turn = seat.play(wanted)
    gone = asyncio.create_task(exchange.gone())
    try:
        while not turn.done():
            patience = KEEP_ALIVE_SECONDS if wanted.stream else None  # the turn itself ends with its rollout
            await asyncio.wait((turn, gone), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not turn.done():
                return
            if wanted.stream and not turn.done():
                if not exchange.begun:
                    await exchange.stream()
                await exchange.events(KEEP_ALIVE)
        await _reply(exchange, seat, dialect, wanted, turn)
    finally:
        gone.cancel()
        turn.cancel("the peer has gone away")


async def _reply(
    exchange: Exchange, seat: Seat, dialect: Dialect, wanted: Wanted, turn: asyncio.Task[TurnReply]
) -> None:
    try:
        reply = _result(turn)
    except GatewayError as error:
        if not exchange.begun:
            raise
        await exchange.events(dialect.error_event(error), more=False)
        return
    decode = _decoder(seat, reply) if wanted.logprobs else None
    if not wanted.stream:
        await exchange.answer(200, dialect.answer(wanted, reply, decode))
        return
    events = list(dialect.events(wanted, reply, decode))
    if not exchange.begun:
        await exchange.stream()
    for event in events[:-1]:
        await exchange.events(event)
    await exchange.events(events[-1], more=False)


def _result(turn: asyncio.Task[TurnReply]) -> TurnReply:
    if turn.cancelled():
        raise GatewayError(409, "rollout_over", "the rollout has ended")
    return turn.result()


def _decoder(seat: Seat, reply: TurnReply) -> Decode:
    tokenizer = seat.rollout.conversations()[reply.role, reply.invocation].agent.tokenizer
    return lambda token: decode_piece(tokenizer, [token])
