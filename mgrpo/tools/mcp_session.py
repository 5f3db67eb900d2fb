"""A connection to an MCP server, as a transport of HttpService: attempts, outages, counters and the cassette are those
of any other service.

    POST .../tools/list               {"tools": [{name, description, parameters}]}
    POST .../tools/call {name, arguments}   {"text", "links", "is_error"}

are answered out of one session, which the first request opens on its loop. The session lives in a task of its own,
since the scopes of its connection have to be left by the task that entered them. It is opened anew after it broke off,
or after TIMEOUTS requests in a row without an answer. A server's HTTP status that was the reason goes on as the status
of the answer, so that a refused key is fatal and 429 is waited for.

Deviation from a plain client: a server that asks back (sampling, elicitation, roots) gets the refusal of the SDK.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import httpx2
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CONNECTION_CLOSED, INVALID_PARAMS, REQUEST_TIMEOUT

from mgrpo.errors import ServiceError

log = logging.getLogger("mgrpo.tools")
TIMEOUTS = 2  # requests in a row that end without an answer, before the session is given up
END_SECONDS = 20.0  # until a session has ended: the SDK's own bounds for a process add up to about 7 s
PAGES = 100  # of a list of tools
Connect = Callable[[Mapping[str, str]], tuple[Any, httpx2.AsyncClient | None]]
"""Headers with the key -> what mcp.Client connects to, and the HTTP client to be closed after it."""

_refusal: ContextVar[dict[str, Any] | None] = ContextVar("mgrpo_mcp_refusal", default=None)


class McpTransport(httpx2.AsyncBaseTransport):
    """Use from one event loop; aclose() ends the session, and the server's process."""

    def __init__(self, name: str, connect: Connect, timeout: float) -> None:
        """timeout: seconds, of opening."""
        self._name, self._connect, self._timeout = name, connect, timeout
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._unanswered = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises httpx2's TransportErrors for what is to be tried again, ServiceError for what is not."""
        body = json.loads(await request.aread() or b"null")
        refusal: dict[str, Any] = {}
        token = _refusal.set(refusal)
        session = None
        try:
            session = await self._opened(_forwarded(request.headers))
            refusal.clear()  # of versions of the protocol that the server does not speak
            if request.url.path.endswith("/tools/list"):
                answer = await _list(session.client)
            else:
                answer = _answer(await session.client.call_tool(body["name"], body["arguments"]))
            self._unanswered = 0
            return httpx2.Response(200, json=answer)
        except asyncio.CancelledError:  # of the caller: mostly its time-out
            self._unanswered += 1
            if self._unanswered >= TIMEOUTS:
                self._give_up(session)
            raise
        except MCPError as error:
            return await self._refused(error, refusal, session)
        except Exception as error:
            if not isinstance(error, ValueError):  # an answer that does not fit the protocol is one call's
                self._give_up(session)
            if isinstance(error, FileNotFoundError | PermissionError):
                raise ServiceError(f"MCP server {self._name!r} cannot be started: {error}") from error
            if isinstance(error, httpx2.TransportError | ServiceError):
                raise
            raise httpx2.ReadError(f"MCP: {type(error).__name__}: {error}") from error
        finally:
            _refusal.reset(token)

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.abandon()
        loop = asyncio.get_running_loop()
        if ending := {task for task in _ending if task.get_loop() is loop}:  # those given up before, too
            _, late = await asyncio.wait(ending, timeout=END_SECONDS)
            for task in late:
                task.cancel()
                log.warning("MCP server %s did not end within %g s", self._name, END_SECONDS)

    async def _opened(self, headers: Mapping[str, str]) -> _Session:
        async with self._opening:
            if self._session is None or self._session.is_over:
                session = _Session(self._name, lambda: self._connect(headers))
                self._session = session
                await session.begin(self._timeout)
            return self._session

    async def _refused(
        self, error: MCPError, refusal: Mapping[str, Any], session: _Session | None
    ) -> httpx2.Response:
        """An error of the protocol as an answer over HTTP."""
        status = refusal.get("status", 0)
        if error.code == REQUEST_TIMEOUT:
            self._give_up(session)
            raise httpx2.ReadTimeout(f"MCP: {error.message}")
        if error.code == INVALID_PARAMS and session is not None:  # the arguments: the policy's matter
            self._unanswered = 0
            return httpx2.Response(200, json={"text": error.message, "links": [], "is_error": True})
        if session is None or error.code == CONNECTION_CLOSED or status == 404:
            self._give_up(session)
            if session is not None or status < 400:
                raise httpx2.ReadError(f"MCP: {error.message} (code {error.code})")
        headers = {"retry-after": refusal["retry-after"]} if refusal.get("retry-after") else {}
        words = {"error": {"message": f"MCP: {error.message} (code {error.code})"}}
        return httpx2.Response(status if status >= 400 else 502, json=words, headers=headers)

    def _give_up(self, session: _Session | None) -> None:
        """End a session behind the caller's back: others of its calls break off and are tried again."""
        if session is None:
            session = self._session
        if session is None or session is not self._session:
            return
        self._session, self._unanswered = None, 0
        session.abandon()


class _Session:
    """An open connection, held by a task."""

    client: Client

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        self._name, self._connect = name, connect
        self._stop = asyncio.Event()
        self._ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(), name=f"mcp-{name}")

    @property
    def is_over(self) -> bool:
        return self._task.done() or self._stop.is_set()

    async def begin(self, seconds: float) -> None:
        """Raises what opening raised, TimeoutError after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                self.client = await asyncio.shield(self._ready)
        except BaseException:
            self.abandon()
            raise

    async def _hold(self) -> None:
        http = None
        try:
            server, http = self._connect()
            async with Client(server) as client:
                self._ready.set_result(client)
                await self._stop.wait()
        except BaseException as error:
            cause = _cause(error)
            if not self._ready.done():
                self._ready.set_exception(cause if isinstance(cause, Exception) else ConnectionError("ended"))
                self._ready.exception()  # retrieved: the caller may have gone
            elif not self._stop.is_set():
                log.warning("MCP server %s: the session broke off: %s", self._name, cause)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            if http is not None:
                await http.aclose()

    def abandon(self) -> None:
        """Let the connection end without waiting for it."""
        self._stop.set()
        if not self._ready.done():
            self._task.cancel()
        _ending.add(self._task)
        self._task.add_done_callback(_ending.discard)


_ending: set[asyncio.Task[None]] = set()
"""Tasks of sessions that were given up: a task that nothing refers to may be collected while it runs."""


def over_http(url: str, headers: Mapping[str, str], timeout: float) -> tuple[Any, httpx2.AsyncClient]:
    """A connection to a server at an address. timeout: seconds, of everything but waiting for answers."""

    async def note(response: httpx2.Response) -> None:
        refusal = _refusal.get()
        if refusal is not None and response.status_code >= 400 and response.request.method == "POST":
            refusal["status"] = response.status_code
            refusal["retry-after"] = response.headers.get("retry-after")

    local = (httpx2.URL(url).host or "") in ("localhost", "127.0.0.1", "::1")
    client = httpx2.AsyncClient(
        headers=dict(headers),
        timeout=httpx2.Timeout(
            timeout, read=None
        ),  # a stream is silent between calls; calls have their own bound
        event_hooks={"response": [note]},
        trust_env=not local,
    )
    return streamable_http_client(url, http_client=client), client


def over_stdio(
    command: Sequence[str], env: Mapping[str, str], passed: Sequence[str], cwd: str | None
) -> tuple[Any, None]:
    """A server as a process. Raises ServiceError for a program or a variable that is not there."""
    if shutil.which(command[0], path=env.get("PATH")) is None:
        raise ServiceError(f"command {command[0]!r}: there is no such program")
    if missing := [name for name in passed if name not in os.environ]:
        raise ServiceError(f"pass_env: the environment variable {missing[0]} is not set")
    whole = dict(env) | {name: os.environ[name] for name in passed}
    server = StdioServerParameters(command=command[0], args=list(command[1:]), env=whole, cwd=cwd)
    # What the server logs goes where the run's own errors go; the default is what stderr was at import.
    return stdio_client(server, errlog=sys.__stderr__ or sys.stderr), None


async def _list(client: Client) -> dict[str, object]:
    found: list[dict[str, object]] = []
    cursor = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor, cache_mode="refresh")
        found += [
            {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            for tool in page.tools
        ]
        cursor = page.next_cursor
        if cursor is None:
            return {"tools": found}
    raise ServiceError(f"an MCP server lists more than {PAGES} pages of tools")


def _answer(result: Any) -> dict[str, object]:
    """A CallToolResult as text: what is no text is named in brackets."""
    texts, links = [], []
    for block in result.content:
        kind = block.type
        if kind == "text":
            texts.append(block.text)
        elif kind == "resource_link":
            texts.append(f"{block.title or block.name} - {block.uri}")
            links.append(str(block.uri))
        elif kind == "resource" and hasattr(block.resource, "text"):
            texts.append(block.resource.text)
        else:
            texts.append(f"[{kind}: not shown]")
    if not texts and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return {"text": "\n".join(texts), "links": links, "is_error": bool(result.is_error)}


def _forwarded(headers: httpx2.Headers) -> dict[str, str]:
    """Headers of a request that are the config's and the key, not those of its own body and connection."""
    own = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "content-type"}
    return {name: value for name, value in headers.items() if name.lower() not in own}


def _cause(error: BaseException) -> BaseException:
    """The first error of a group of groups that is not a cancellation."""
    while isinstance(error, BaseExceptionGroup):
        inner = [e for e in error.exceptions if not isinstance(e, asyncio.CancelledError)]
        error = (inner or error.exceptions)[0]
    return error
