"""`mgrpo tools serve`: a corpus over HTTP, so that any trainer or agent can search it.

    POST /retrieve {queries, topk, return_scores}   Search-R1's search: {result: [[{document: {id, contents}, score}]]},
                                                    without scores the documents alone
    POST /access {urls}                             {result: [{contents} or null]}
    GET  /health                                    {status, pages, digest}
    /mcp                                            the tools `search` and `visit` over MCP (streamable HTTP)

On loopback, which is the default, only requests that name loopback are answered: a web page must not reach the server
through a name that resolves to this machine. On another address anybody who reaches it may read the corpus.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgrpo.addresses import is_loopback
from mgrpo.errors import ConfigError
from mgrpo.tools.corpus import Corpus, Hit
from mgrpo.tools.corpus_tools import corpus_tools
from mgrpo.tools.toolset import ToolSet

QUERIES = 512  # of one request
TOPK = 100
BODY = 4 * 2**20  # bytes of a request
MISSING = 'serving tools needs mcp, starlette and uvicorn; pip install "mgrpo[research]"'


def serve(path: Path, host: str, port: int, *, k: int = 5, page_chars: int = 4000) -> None:
    """Serve a corpus until Ctrl-C. Raises ConfigError when the file or the address cannot be used."""
    import socket

    try:
        import uvicorn
    except ImportError:
        raise ConfigError(MISSING) from None
    corpus = Corpus.open(path)
    try:
        app = application(corpus, host, k=k, page_chars=page_chars)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
                listener.listen(128)
            except OSError as error:
                raise ConfigError(
                    f"--host {host} --port {port}: cannot listen there ({error.strerror})"
                ) from None
            shown = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            print(f"{path}: {corpus.size} pages, digest {corpus.digest[:16]}", flush=True)
            print(f"Search-R1: {shown}/retrieve and /access; MCP: {shown}/mcp   (Ctrl-C ends it)", flush=True)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
            server.run(sockets=[listener])
    finally:
        corpus.close()


def application(corpus: Corpus, host: str = "127.0.0.1", *, k: int = 5, page_chars: int = 4000) -> Any:
    """A corpus as an ASGI application with a lifespan. host: the address that it listens on; k and page_chars: of the
    MCP tools, k also where a request names no topk."""
    try:
        from mcp.server.transport_security import TransportSecuritySettings
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise ConfigError(MISSING) from None
    local = is_loopback(host)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "pages": corpus.size, "digest": corpus.digest})

    async def retrieve(request: Request) -> Response:
        def answer(body: dict[str, Any]) -> object:
            queries = _texts(body, "queries")
            topk = body.get("topk", k)
            topk = k if topk is None else topk
            if isinstance(topk, bool) or not isinstance(topk, int) or not 1 <= topk <= TOPK:
                raise ValueError(f"topk {topk!r:.40} is not a whole number from 1 to {TOPK}")
            if not isinstance(scores := body.get("return_scores", False), bool):
                raise ValueError(f"return_scores {scores!r:.40} is neither true nor false")
            return [[_entry(hit, scores) for hit in corpus.search(query, topk)] for query in queries]

        return await reply(request, answer)

    async def access(request: Request) -> Response:
        def answer(body: dict[str, Any]) -> object:
            pages = [corpus.page(url) for url in _texts(body, "urls")]
            return [
                p and {"url": p.url, "title": p.title, "contents": f'"{p.title}"\n{p.text}'} for p in pages
            ]

        return await reply(request, answer)

    async def reply(request: Request, answer: Callable[[dict[str, Any]], object]) -> Response:
        named = (request.headers.get("host") or "").rsplit(":", 1)[0].strip("[]")
        if local and not is_loopback(named):
            return JSONResponse({"detail": "this server answers loopback only"}, 403)
        try:
            body = await _body(request)
            return JSONResponse({"result": await asyncio.to_thread(answer, body)})
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 422)

    routes = [
        Route("/health", health),
        Route("/retrieve", retrieve, methods=["POST"]),
        Route("/access", access, methods=["POST"]),
    ]
    security = None if local else TransportSecuritySettings(enable_dns_rebinding_protection=False)
    return mcp_server(ToolSet(corpus_tools(corpus, k=k, page_chars=page_chars))).streamable_http_app(
        host="127.0.0.1" if local else host,
        stateless_http=True,
        json_response=True,
        transport_security=security,
        custom_starlette_routes=routes,
    )


def mcp_server(tools: ToolSet, name: str = "mgrpo") -> Any:
    """Tools as an MCP server: a tool_error is an answer with is_error."""
    try:
        from mcp.server import Server
        from mcp.types import CallToolResult, ListToolsResult, TextContent, Tool
    except ImportError:
        raise ConfigError(MISSING) from None

    async def list_tools(context: Any, params: Any) -> ListToolsResult:
        functions: list[Any] = [schema["function"] for schema in tools.schemas()]
        return ListToolsResult(
            tools=[
                Tool(name=f["name"], description=f["description"], input_schema=f["parameters"])
                for f in functions
            ]
        )

    async def call_tool(context: Any, params: Any) -> CallToolResult:
        seen = await tools.call(params.name, params.arguments or {})
        return CallToolResult(
            content=[TextContent(type="text", text=seen.text)], is_error=seen.status == "tool_error"
        )

    return Server(name, on_list_tools=list_tools, on_call_tool=call_tool)


async def _body(request: Any) -> dict[str, Any]:
    """A request's JSON object. Raises ValueError for anything else."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY:
            raise ValueError(f"the request has more than {BODY} bytes")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise ValueError("the request is no JSON") from None
    if not isinstance(body, dict):
        raise ValueError("the request is no JSON object")
    return body


def _texts(body: dict[str, Any], key: str) -> list[str]:
    found = body.get(key)
    if (
        not isinstance(found, list)
        or len(found) > QUERIES
        or not all(isinstance(text, str) for text in found)
    ):
        raise ValueError(f"{key} is no list of at most {QUERIES} texts")
    return found


def _entry(hit: Hit, scores: bool) -> dict[str, object]:
    """A result as Search-R1 writes it."""
    document = {
        "id": hit.url,
        "url": hit.url,
        "title": hit.title,
        "contents": f'"{hit.title}"\n{hit.passage}',
    }
    return {"document": document, "score": hit.score} if scores else dict(document)
