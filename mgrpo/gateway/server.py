"""The HTTP server of one rollout worker: programs reach their policies here, each rollout at a base URL of its own.

    POST /rollout/{id}/v1/chat/completions | responses | messages      the role is the request's `model`
    POST /rollout/{id}/agent/{role}/v1/...                             the role is in the path
    GET  /rollout/{id}/v1/models                                       the roles
    POST /rollout/{id}/reward {role, invocation, name, value}          a score of one conversation
    GET  /health                                                       no token needed

Every request but the last carries its rollout's token (Authorization: Bearer, or x-api-key); what is wrong about id or
token is not said. `x-mgrpo-invocation: n` names the conversation, where the history alone does not tell it. On
loopback, the default, only requests that name loopback are answered, and none of a web page of another host: it must
reach the gateway neither through a name that resolves to this machine nor by a request whose answer it cannot read.
"""

from __future__ import annotations

import asyncio
import contextvars
import hmac
import logging
import re
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from mgrpo.addresses import is_loopback
from mgrpo.errors import ConfigError
from mgrpo.gateway import body, fields
from mgrpo.gateway.chat_completions import ChatCompletions
from mgrpo.gateway.dialect import Asked, Dialect
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.exchange import Exchange, PeerGoneError, Receive, Rollout, Seat, Send, converse
from mgrpo.gateway.messages import Messages
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.responses import Responses

if TYPE_CHECKING:
    from mgrpo.gateway.connections import Server

log = logging.getLogger("mgrpo.gateway")

MISSING = 'the gateway\'s server is an extra: pip install "mgrpo[gateway]"'
START_SECONDS, CLOSE_SECONDS, FLUSH_SECONDS = 10.0, 5.0, 0.5
BODIES = 8
"""Largest bodies that may be arriving at the same time."""
KEPT_CHARACTERS = 8_000_000
"""Of a rollout's replies and what they follow, for the Responses API's previous_response_id."""
REMEMBERED = 1024
"""Rollouts whose late requests are told that they are over."""
PATH = re.compile(
    r"/rollout/(?P<id>[\w-]{1,200})(?:/agent/(?P<role>[^/]{1,400}))?(?:/v1){0,2}/"
    r"(?P<what>chat/completions|responses|messages|models(?:/[^/]{1,400})?|reward)/?"
)
FRAMING = "ambiguous_length"
CHAT, MESSAGES = ChatCompletions(), Messages()
Extra = Callable[[Exchange], Awaitable[bool]]
"""Answers a request whose path is its own, or raises GatewayError; False for any other. Tokens are its matter."""


class Gateway:
    """Use from one event loop, which is the one that plays."""

    def __init__(self, options: GatewayOptions, extra: Extra | None = None) -> None:
        """extra: answers what is served beside the rollouts. Raises ConfigError when uvicorn is missing. Nothing
        listens before start()."""
        try:
            import uvicorn  # noqa: F401
        except ImportError:
            raise ConfigError(MISSING) from None
        self.options, self._extra = options, extra
        self.url = ""
        self._limit = int(options.body_mb * 1e6)
        self._room = body.Room(BODIES * self._limit)
        self._seats: dict[str, Seat] = {}
        self._over: OrderedDict[str, str] = OrderedDict()  # id -> token
        self._server: Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen. Raises ConfigError naming host and port where that is impossible."""
        from mgrpo.gateway.connections import server_of

        listener = _listen(self.options)
        self.url = _url(self.options, listener)
        self._server = server = server_of(self._serve, self.options.idle_seconds)
        loop = asyncio.get_running_loop()
        # Contexts of their own: neither belongs to an attempt at a rollout, wherever start() was called.
        serving = loop.create_task(server.serve(sockets=[listener]), context=contextvars.Context())
        watching = loop.create_task(server.watch(self.options.idle_seconds), context=contextvars.Context())
        ready = loop.create_task(server.ready.wait(), context=contextvars.Context())
        self._tasks = [serving, watching]
        await asyncio.wait((serving, ready), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not server.started:
            ready.cancel()
            await self.close()
            listener.close()
            raise ConfigError(f"the gateway at {self.url} had not started after {START_SECONDS:g} s")

    def open(self, rollout: Rollout) -> str:
        """Answer requests to a rollout from now on. Returns its base URL for OpenAI's clients; Anthropic's add /v1
        themselves, so theirs is the same without it."""
        if rollout.id in self._seats:
            raise ValueError(f"rollout {rollout.id} is open already")
        self._seats[rollout.id] = Seat(rollout, self.options.turns, KEPT_CHARACTERS)
        return f"{self.url}/rollout/{rollout.id}/v1"

    def close_rollout(self, rollout: Rollout) -> None:
        """Answer no more requests to it, those that wait included. Idempotent. Its turns end with its own end()."""
        seat = self._seats.pop(rollout.id, None)
        if seat is None:
            return
        seat.cancel()
        self._over[rollout.id] = rollout.token
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)

    async def close(self) -> None:
        """Close all rollouts, connections and tasks within seconds, whatever peers do. Idempotent."""
        for seat in list(self._seats.values()):
            self.close_rollout(seat.rollout)
        server, tasks = self._server, self._tasks
        self._server, self._tasks = None, []
        if server is None:
            return
        serving, watching = tasks
        watching.cancel()
        server.stop()
        _, left = await asyncio.wait((serving,), timeout=FLUSH_SECONDS)
        if left:
            server.abort_all()
            _, left = await asyncio.wait((serving,), timeout=CLOSE_SECONDS)
        if left:  # a handler that does not end
            for task in list(server.server_state.tasks):
                task.cancel()
            server.force_exit = True
            serving.cancel()
        await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    # -- requests --

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        dialect: Dialect = MESSAGES if "/messages" in exchange.path else CHAT
        try:
            try:
                await self._answer(exchange, dialect)
            except GatewayError as error:
                await _refuse(exchange, dialect, error)
            except PeerGoneError:
                return
        except Exception as error:  # of ours: the peer learns its kind, the log all of it
            log.error("a request to the gateway failed", exc_info=error)
            told = GatewayError(500, "internal_error", f"the gateway failed ({type(error).__name__})")
            if exchange.begun:
                raise  # uvicorn cuts the connection off
            await _refuse(exchange, dialect, told)

    async def _answer(self, exchange: Exchange, dialect: Dialect) -> None:
        self._check_host(exchange)
        if (
            exchange.header(b"transfer-encoding") is not None
            and exchange.header(b"content-length") is not None
        ):
            raise GatewayError(400, FRAMING, "a request has either a Content-Length or a Transfer-Encoding")
        if exchange.path == "/health":
            _check_method(exchange, "GET")
            await exchange.answer(200, {"status": "ok"})
            return
        if self._extra is not None and await self._extra(exchange):
            return
        found = PATH.fullmatch(exchange.path)
        if found is None:
            raise GatewayError(404, "not_found", "nothing is served at this path")
        what = found["what"]
        seat = self._seat(found["id"], exchange)
        _check_method(exchange, "GET" if what.startswith("models") else "POST")
        if what.startswith("models"):
            await exchange.answer(200, _models(seat, unquote(what.partition("/")[2])))
            return
        most = 2 * self.options.concurrent_turns
        if seat.requests >= most:
            raise GatewayError(
                429, "too_many_requests", f"{seat.requests} requests of this rollout at once, at most {most}"
            )
        seat.requests += 1
        try:
            table = await body.read(exchange.parts(), exchange.length(), self._limit, self._room)
            if what == "reward":
                await exchange.answer(200, _reward(seat, table))
                return
            if what == "responses":
                dialect = Responses(seat.kept)
            await converse(exchange, seat, dialect, table, _asked(exchange, found["role"]))
        finally:
            seat.requests -= 1

    def _check_host(self, exchange: Exchange) -> None:
        if not is_loopback(self.options.host):
            return
        named = _named(exchange.header(b"host") or "")
        if not is_loopback(named) and named != self.options.advertise:
            raise GatewayError(403, "forbidden", "this gateway answers loopback only")
        origin = exchange.header(b"origin")
        if origin is not None and not is_loopback(_named(origin.rpartition("//")[2])):
            raise GatewayError(403, "forbidden", "this gateway does not answer web pages of other hosts")

    def _seat(self, identity: str, exchange: Exchange) -> Seat:
        """The rollout of an id, if the request has its token. A wrong token looks like an id that was never given."""
        scheme, _, given = (exchange.header(b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            given = exchange.header(b"x-api-key") or ""
        seat = self._seats.get(identity)
        token = seat.rollout.token if seat is not None else self._over.get(identity, "")
        matches = hmac.compare_digest(given.strip().encode(), token.encode())
        if not matches or not token:
            raise GatewayError(401, "invalid_api_key", "no rollout has this address and this token")
        if seat is None:
            raise GatewayError(409, "rollout_over", "the rollout has ended")
        return seat


async def _refuse(exchange: Exchange, dialect: Dialect, error: GatewayError) -> None:
    headers: list[tuple[bytes, bytes]] = []
    if error.status == 409 and error.code != "conversation_busy":
        headers.append((b"x-should-retry", b"false"))  # SDKs would ask again otherwise
    if error.code == FRAMING:  # where it ends, a proxy between us may have seen otherwise
        headers.append((b"connection", b"close"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await exchange.answer(error.status, dialect.error(error), headers)


def _check_method(exchange: Exchange, expected: str) -> None:
    if exchange.method != expected:
        raise GatewayError(
            405, "method_not_allowed", f"{exchange.method:.20} is not served here, {expected} is"
        )


def _asked(exchange: Exchange, role: str | None) -> Asked:
    named, count = exchange.header(b"x-mgrpo-invocation"), exchange.header(b"x-stainless-retry-count")
    if named is not None and not re.fullmatch(r"[0-9]{1,9}", named):
        raise fields.refusal("header x-mgrpo-invocation", named, "a whole number")
    repeated = bool(count and re.fullmatch(r"[0-9]{1,9}", count) and int(count))
    return Asked(unquote(role) if role else None, None if named is None else int(named), repeated)


def _models(seat: Seat, one: str) -> dict[str, Any]:
    """The roles, as OpenAI's and Anthropic's clients list models, or one of them."""
    found: dict[str, dict[str, Any]] = {
        role: {
            "id": role,
            "object": "model",
            "type": "model",
            "created": 0,
            "created_at": "1970-01-01T00:00:00Z",
            "owned_by": "mgrpo",
            "display_name": role,
            "lifecycle": "active",
        }
        for role in seat.rollout.roles
    }
    if one:
        if one not in found:
            raise GatewayError(404, "model_not_found", f"no role {one!r:.100}; roles: {', '.join(found)}")
        return found[one]
    ends = {"first_id": next(iter(found), None), "last_id": next(reversed(found), None)}
    return {"object": "list", "data": list(found.values()), "has_more": False, **ends}


def _reward(seat: Seat, table: fields.Table) -> dict[str, Any]:
    value = fields.number(table, "value")
    if value is None:
        raise fields.refusal("value", None, "a number")
    role, name = fields.needed(table, "role"), fields.needed(table, "name")
    invocation = fields.whole(table, "invocation", 0) or 0
    seat.rollout.reward(role, invocation, name, float(value))
    return {"role": role, "invocation": invocation, "name": name, "value": value}


# -- addresses --


def _named(place: str) -> str:
    """The host of host:port."""
    return re.sub(r":\d*$", "", place).strip("[]")


def _listen(options: GatewayOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        listener.listen()
        listener.setblocking(False)
    except (OSError, UnicodeError) as error:
        listener.close()
        words = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"task.options.gateway: cannot listen on host {options.host!r}, port {options.port} ({words})"
        ) from None
    return listener


def _url(options: GatewayOptions, listener: socket.socket) -> str:
    """Where programs find it: under the name that is advertised; without one, of every address loopback's."""
    host = options.advertise or {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
