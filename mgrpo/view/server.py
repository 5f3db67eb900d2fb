"""`mgrpo view`: the run page, served from this machine or written as one file.

The page is one static document: its scripts and styles are inlined, it loads nothing from anywhere, and its content
policy forbids it to. A server on loopback answers only requests that name loopback; on any other address it asks for
the token that it prints.
"""

from __future__ import annotations

import html
import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgrpo.addresses import is_loopback
from mgrpo.errors import ConfigError
from mgrpo.files import write_atomic
from mgrpo.view.data import Json, RunView

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("base.js", "curves.js", "timeline.js", "spans.js", "services.js", "steps.js", "tools.js", "tree.js",
           "rollouts.js", "app.js")  # fmt: skip
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
COOKIE = "mgrpo-token"
TREES = 2000  # rollout trees in an exported file, unless --trees says otherwise


def page(title: str, data: str = "") -> str:
    """The document. data: a JSON text for a page that needs no server."""
    scripts = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    # In a script element only "</" can end it early; inside JSON strings it may be written "<\/".
    embedded = data.replace("<", "\\u003c")
    return (
        (PAGE / "index.html")
        .read_text(encoding="utf-8")
        .replace("{{title}}", html.escape(title))
        .replace("{{policy}}", POLICY)
        .replace("{{style}}", (PAGE / "style.css").read_text(encoding="utf-8"))
        .replace("{{data}}", embedded)
        .replace("{{scripts}}", scripts)
    )


def export(run: Path, file: Path, trees: int = TREES) -> None:
    """Write the page as one file that needs no network: all curves and steps, and the trees of `trees` rollouts,
    half of them the first, half the last, and of those that its lists of the slowest name. Raises ConfigError."""
    if file.exists() and not file.is_file():  # a device, whose name the page would take away
        raise ConfigError(f"--export {file}: is there already and is no file")
    view = RunView(run)
    timeline = view.timeline()
    overview = view.overview()  # after it: its notes name the spans that could not be read
    ids = view.ids()
    if len(ids) > trees:
        slowest = [row["rollout"] for rows in _slowest(timeline) for row in rows if row["rollout"]]
        ids = list(
            dict.fromkeys(ids[: trees // 2] + ids[len(ids) - (trees - trees // 2) :] + slowest[:trees])
        )
    data = {
        "overview": overview | {"live": False},
        "timeline": timeline,
        "steps": {
            f"{role}/{s}": shown
            for role, steps in overview["steps"].items()
            for s in steps
            if (shown := _recorded(view.step, role, s)) is not None
        },
        "rollouts": {i: shown for i in ids if (shown := _recorded(view.rollout, i)) is not None},
    }
    try:
        write_atomic(file, page(str(run), as_json(data)))
    except OSError as error:
        raise ConfigError(f"--export {file}: cannot be written ({error.strerror})") from None


def _slowest(timeline: Json) -> list[list[Json]]:
    """The lists of the slowest rollouts, turns and tool calls; none where no spans were recorded."""
    return list((timeline["timeline"] or {}).get("slowest", {}).values())


def _recorded(look: Callable[..., Json], *what: object) -> Json | None:
    """None for what cannot be read any more; the page says which files."""
    try:
        return look(*what)
    except ConfigError:
        return None


def as_json(data: object) -> str:
    """JSON as browsers read it: numbers that are not finite become null."""
    try:
        return json.dumps(data, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data))


def _finite(data: object) -> object:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def serve(run: Path, host: str, port: int) -> None:
    """Serve the page until Ctrl-C. Raises ConfigError when the address cannot be used."""
    import socket

    try:
        import uvicorn
    except ImportError:
        raise ConfigError(
            'the page\'s server is an extra: pip install "mgrpo[view]", or --export FILE'
        ) from None
    view = RunView(run)
    token = "" if is_loopback(host) else secrets.token_urlsafe(24)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    shown = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    print(f"{run}: http://{shown}:{listener.getsockname()[1]}/{query}   (Ctrl-C ends it)", flush=True)
    server = uvicorn.Server(uvicorn.Config(application(view, token), log_level="warning", lifespan="off"))
    with listener:
        server.run(sockets=[listener])


def application(view: RunView, token: str) -> Any:
    """The page and its four questions as an ASGI application. token: "" asks for none but serves loopback only."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def refused(request: Request) -> Response | None:
        if not token:  # another site's page must not reach us through a name that resolves to loopback
            named = (request.headers.get("host") or "").rsplit(":", 1)[0].strip("[]")
            return None if is_loopback(named) else PlainTextResponse("this server answers loopback only", 403)
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        if secrets.compare_digest(given.encode(), token.encode()):
            return None
        return PlainTextResponse("a token is needed: open the address that `mgrpo view` printed", 403)

    def index(request: Request) -> Response:
        answer = refused(request)
        if answer is None:
            answer = HTMLResponse(page(view.run.name), headers=_headers())
            if token:
                answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return answer

    def ask(request: Request) -> Response:
        answer = refused(request)
        if answer is not None:
            return answer
        query = request.query_params
        try:
            if request.url.path == "/api/run":
                data = view.overview(int(query.get("have", "0")))
            elif request.url.path == "/api/timeline":
                data = view.timeline()
            elif request.url.path == "/api/step":
                data = view.step(query.get("role", ""), int(query.get("step", "-1")))
            else:
                data = view.rollout(query.get("id", ""))
        except (ConfigError, ValueError) as error:
            return PlainTextResponse(str(error), 404)
        return Response(as_json(data), media_type="application/json", headers=_headers())

    routes = [
        Route("/", index),
        *(Route(f"/api/{name}", ask) for name in ("run", "timeline", "step", "rollout")),
    ]
    return Starlette(routes=routes, middleware=[Middleware(GZipMiddleware, minimum_size=4096)])


def _headers() -> dict[str, str]:
    return {
        "Cache-Control": "no-store",
        "Content-Security-Policy": POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
