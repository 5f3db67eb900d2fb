"""Tools of MCP servers in memory, over stdio and over HTTP: what agents get, what is tried again, what ends."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp.server import Server
from mcp.types import (
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ListToolsResult,
    ResourceLink,
    TextContent,
    TextResourceContents,
    Tool,
)

from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.services import counters
from mgrpo.services.cassette import Cassette
from mgrpo.tools.base import Observation
from mgrpo.tools.corpus import Corpus, Page
from mgrpo.tools.mcp import McpConfig, McpTool
from mgrpo.tools.mcp_session import McpTransport
from mgrpo.tools.registry import build_tools
from mgrpo.tools.serve import application
from mgrpo.tools.toolset import ToolSet
from tests.serving import serving

KEY = "sk-very-secret"
ANY = {"type": "object", "properties": {"q": {"type": "string"}}}

# A server of nothing but lines of JSON: it counts its calls, repeats, fails and dies as it is asked to.
SERVER = """
import json, os, sys
calls = 0
for line in sys.stdin:
    ask = json.loads(line)
    if "id" not in ask:
        continue
    method, params = ask["method"], ask.get("params") or {}
    if method == "initialize":
        answer = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                  "serverInfo": {"name": "s", "version": "1"}}
    elif method == "tools/list":
        tool = {"description": "Says it.", "inputSchema": {"type": "object", "properties": {"q": {"type": "string"}}}}
        answer = {"tools": [{"name": "say-it", **tool}, {"name": "spare", **tool}]}
    elif method == "tools/call":
        q = params["arguments"]["q"]
        calls += 1
        if q == "die" or (q == "die once" and not os.path.exists("died")):
            open("died", "w").close()
            sys.exit(3)
        if q == "reject":
            reply = {"jsonrpc": "2.0", "id": ask["id"], "error": {"code": -32602, "message": "q is odd"}}
            print(json.dumps(reply), flush=True)
            continue
        text = f"{q} {os.getpid()} {calls} {os.environ.get('SECRET', '-')} {os.environ.get('MODE', '-')}"
        answer = {"content": [{"type": "text", "text": q if q.startswith("error") else text}],
                  "isError": q.startswith("error")}
    else:
        reply = {"jsonrpc": "2.0", "id": ask["id"], "error": {"code": -32601, "message": "no such method"}}
        print(json.dumps(reply), flush=True)
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": ask["id"], "result": answer}), flush=True)
"""


def entry(folder: Path, **keys: object) -> dict[str, object]:
    """The keys of a stdio server in a folder of its own."""
    (folder / "server.py").write_text(SERVER)
    own = {"command": [sys.executable, "server.py"], "cwd": str(folder), "attempts": 3, "backoff": 0.0}
    return {"type": "mcp", "timeout": 20.0} | own | keys


def run(tools: ToolSet, *calls: tuple[str, dict[str, object]]) -> list[Any]:
    """Observation or error of each call after the other; the tools are closed."""

    async def main() -> list[Any]:
        found: list[Any] = []
        try:
            for name, arguments in calls:
                try:
                    found.append(await tools.call(name, arguments))
                except Exception as error:
                    found.append(error)
        finally:
            await tools.close()
        return found

    return asyncio.run(main())


def say(*texts: str) -> list[tuple[str, dict[str, object]]]:
    return [("say_it", {"q": text}) for text in texts]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_over_stdio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tools are listed when the tools are built, calls share one process, which gets the variables that are named
    and has ended when the tools are closed."""
    monkeypatch.setenv("SECRET", KEY)
    monkeypatch.setenv("OTHER", "x")
    tools = build_tools({"s": entry(tmp_path, env={"MODE": "OTHER"}, pass_env=["SECRET"], exclude=["spare"])})
    assert tools.names == ("say_it",) and tools.schemas()[0]["function"]["description"] == "Says it."  # type: ignore[index]
    assert len(tools.versions["say_it"]) == 16
    first, second = run(tools, *say("a", "b"))
    word, pid, number, secret, mode = first.text.split()
    assert (word, number, secret, mode) == ("a", "1", KEY, "OTHER")
    assert second.text.split()[:3] == ["b", pid, "2"] and first.status == "ok"
    assert not is_running(int(pid))


def test_a_session_that_breaks_off_is_opened_again(tmp_path: Path) -> None:
    """A process that dies under a call costs the call an attempt; one that dies every time fails it. Nothing is left
    running."""
    tools = build_tools({"s": entry(tmp_path)})
    counters.take()
    before, after, dead, last = run(tools, *say("a", "die once", "die", "b"))
    pids = [int(seen.text.split()[-4]) for seen in (before, after, last)]
    assert len(set(pids)) == 3 and after.text.startswith("die once ") and last.status == "ok"
    assert isinstance(dead, InfrastructureError)
    assert not any(map(is_running, pids))
    assert counters.take()["service/s/retries"] >= 3.0


def test_what_an_error_of_a_tool_is(tmp_path: Path) -> None:
    """The policy's to read, unless a pattern finds infrastructure in it or `errors` says so; arguments that the server
    rejects are the policy's too."""
    texts = (
        "error: no such city",
        "reject",
        "error: 503",
        "error: the request timed out",
        "error: Rate limit hit",
    )
    tools = build_tools({"s": entry(tmp_path, attempts=2)})
    found = run(tools, *say("a", *texts))[1:]
    assert [(seen.status, seen.text) for seen in found[:2]] == [
        ("tool_error", "error: no such city"),
        ("tool_error", "q is odd"),
    ]
    assert all(isinstance(error, InfrastructureError) for error in found[2:]), found
    strict = build_tools({"s": entry(tmp_path, attempts=2, errors="infrastructure")})
    assert isinstance(run(strict, *say("a", "error: no such city"))[1], InfrastructureError)
    loose = build_tools({"s": entry(tmp_path, failures=["city"])})
    assert run(loose, *say("a", "error: 503"))[1].text == "error: 503"


def test_a_replay_starts_nothing(tmp_path: Path) -> None:
    """List and answers come from the cassette; what was not recorded ends the run."""
    recording = Cassette(tmp_path / "c.sqlite", "record")
    [live] = run(build_tools({"s": entry(tmp_path)}, recording), *say("a"))
    recording.close()
    replay = Cassette(tmp_path / "c.sqlite", "replay")
    tools = build_tools({"s": {"type": "mcp", "command": ["/no/such/program"]}}, replay)
    again, missing = run(tools, *say("a", "b"))
    replay.close()
    assert (again.text, again.source) == (live.text, "replay") and isinstance(missing, ServiceError)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    """Is an error before the run starts, as is one that is no server, and a variable that is not set."""
    with pytest.raises(ConfigError, match="there is no such program"):
        build_tools({"s": {"type": "mcp", "command": ["/no/such/program"]}})
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        build_tools({"s": entry(tmp_path, pass_env=["NO_SUCH_KEY"])})
    with pytest.raises(ConfigError, match=r"down for|does not list its tools"):
        build_tools({"s": entry(tmp_path, command=["true"], attempts=1, max_outage=0.1)})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "expected either url or command"),
        ({"url": "http://h/mcp", "command": ["x"]}, "expected either url or command"),
        ({"command": ["x"], "key_env": "KEY"}, "a command gets keys by pass_env"),
        ({"url": "http://h/mcp", "pass_env": ["A"]}, "are for command"),
        ({"url": "h/mcp"}, "expected http"),
        ({"command": ["x"], "failures": ["["]}, "no regular expression"),
    ],
)
def test_wrong_keys_are_named(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_tools({"s": {"type": "mcp"} | keys})
    assert words in str(caught.value)


class Gate:
    """An application before another: it answers a request that calls a tool with the next status that is planned."""

    def __init__(self, app: Any) -> None:
        self.app, self.planned, self.headers = app, [0][:0], [b""][:0]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.headers.append(dict(scope["headers"]).get(b"authorization", b""))
        message = await receive()
        if b'"tools/call"' in message.get("body", b"") and self.planned:
            status = self.planned.pop(0)
            head = [(b"content-type", b"text/plain"), (b"retry-after", b"0")]
            await send({"type": "http.response.start", "status": status, "headers": head})
            return await send({"type": "http.response.body", "body": b"FAULT of a proxy"})
        queue = [message]

        async def again() -> Any:
            return queue.pop() if queue else await receive()

        return await self.app(scope, again, send)


def test_a_server_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools of `mgrpo tools serve`, with a key; statuses of the server are what they are for any service: 429 and
    503 are tried again, 401 ends the run."""
    monkeypatch.setenv("MCP_KEY", KEY)
    corpus = Corpus.build(tmp_path / "c.sqlite", [Page("https://x.org/fj", "Fiji", "The capital is Suva.")])
    gate = Gate(application(corpus))
    with serving(gate) as url:
        keys = {"type": "mcp", "url": f"{url}/mcp", "key_env": "MCP_KEY", "attempts": 3, "backoff": 0.0}
        tools = build_tools({"wiki": keys | {"rename": {"search": "find"}}})
        assert tools.names == ("find", "visit")
        counters.take()
        gate.planned += [429, 503]
        found, page, missing = run(
            tools,
            ("find", {"query": "capital \ud800"}),
            ("visit", {"url": "x.org/fj"}),
            ("visit", {"url": "x.org/none"}),
        )
        assert counters.take()["service/wiki/retries"] == 2.0
        gate.planned += [401]
        [refused] = run(build_tools({"wiki": keys}), ("search", {"query": "a"}))
    assert found.text.startswith("[1] Fiji\nhttps://x.org/fj\n") and found.links == ("https://x.org/fj",)
    assert "The capital is Suva." in page.text
    assert missing.status == "tool_error" and missing.text.startswith("There is no page")
    assert isinstance(refused, ServiceError) and "status 401" in str(refused) and KEY not in str(refused)
    assert set(gate.headers) == {f"Bearer {KEY}".encode()}
    corpus.close()


def test_a_server_that_is_not_there_is_named() -> None:
    """404 is a wrong address; a refused connection is an outage, which the list waits for no longer than max_outage."""

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    with serving(nothing) as url, pytest.raises(ConfigError, match="is the address right"):
        build_tools({"s": {"type": "mcp", "url": f"{url}/mcp"}})
    with pytest.raises(ConfigError, match=r"down for|does not list"):
        build_tools(
            {"s": {"type": "mcp", "url": f"{url}/mcp", "attempts": 2, "backoff": 0.0, "max_outage": 0.01}}
        )


def in_memory(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection of an McpConfig goes to this server, in this process."""
    monkeypatch.setattr(
        McpConfig,
        "_transport",
        lambda self, name: McpTransport(name, lambda headers: (server, None), self.timeout),
    )


def answering(content: list[Any], **more: Any) -> Server[Any]:
    async def list_tools(context: Any, params: Any) -> ListToolsResult:
        return ListToolsResult(tools=[Tool(name="t.a", input_schema=ANY), Tool(name="b", input_schema=ANY)])

    async def call_tool(context: Any, params: Any) -> CallToolResult:
        return CallToolResult(content=content, **more)

    return Server("memory", on_list_tools=list_tools, on_call_tool=call_tool)


def test_what_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and texts of resources are shown, links listed, pictures named; a long answer is cut; nothing is empty."""
    content: list[Any] = [
        TextContent(type="text", text="a https://x.org/1"),
        ImageContent(type="image", data="AAAA", mime_type="image/png"),
        ResourceLink(type="resource_link", name="Fiji", uri="https://x.org/fj"),
        EmbeddedResource(type="resource", resource=TextResourceContents(uri="file:///a", text="b" * 300)),
    ]
    in_memory(answering(content), monkeypatch)
    keys = {"type": "mcp", "command": ["x"], "max_chars": 250}
    [seen] = run(build_tools({"m": keys}), ("t_a", {}))
    start = "a https://x.org/1\n[image: not shown]\nFiji - https://x.org/fj\n"
    assert seen.text == start + "b" * (250 - len(start)) + "\n[cut: the first 250 characters]"
    assert seen.links == ("https://x.org/fj", "https://x.org/1")
    in_memory(answering([], structured_content={"a": "ü"}), monkeypatch)
    assert run(build_tools({"m": keys}), ("b", {}))[0].text == '{"a": "ü"}'
    in_memory(answering([]), monkeypatch)
    [seen] = run(build_tools({"m": keys}), ("b", {}))
    assert (seen.text, seen.status) == ("", "empty")


def test_calls_at_once_share_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tools and rollouts, one connection, which is opened once and closed once."""
    opened, server = [0], answering([TextContent(type="text", text="a")])
    monkeypatch.setattr(
        McpConfig,
        "_transport",
        lambda self, name: McpTransport(
            name, lambda headers: (opened.__setitem__(0, opened[0] + 1) or server, None), self.timeout
        ),
    )
    tools = build_tools({"m": {"type": "mcp", "command": ["x"], "concurrency": 4}})
    assert opened == [1] and all(isinstance(tool, McpTool) for tool in tools._tools.values())

    async def main() -> list[Observation]:
        try:
            return list(await asyncio.gather(*(tools.call(n, {"q": "x"}) for n in ("t_a", "b") * 8)))
        finally:
            await tools.close()
            await tools.close()

    assert [seen.text for seen in asyncio.run(main())] == ["a"] * 16 and opened == [2]


def test_a_server_that_hangs_is_connected_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two time-outs in a row: the first two connections that calls make never answer, the third does."""
    asked: list[int] = []
    connections = [0]

    def connect(headers: Any) -> tuple[Any, None]:
        connections[0] += 1
        number = connections[0]

        async def list_tools(context: Any, params: Any) -> ListToolsResult:
            return ListToolsResult(tools=[Tool(name="a", input_schema=ANY)])

        async def call_tool(context: Any, params: Any) -> CallToolResult:
            asked.append(number)
            if number in (2, 3):
                await asyncio.Event().wait()
            return CallToolResult(content=[TextContent(type="text", text="at last")])

        return Server("memory", on_list_tools=list_tools, on_call_tool=call_tool), None

    monkeypatch.setattr(McpConfig, "_transport", lambda self, name: McpTransport(name, connect, self.timeout))
    keys = {"type": "mcp", "command": ["x"], "timeout": 0.25, "attempts": 60, "backoff": 0.0}
    [seen] = run(build_tools({"m": keys}), ("a", {}))
    assert seen.text == "at last"
    assert [number for number in asked if number in (2, 3)] == [2, 2, 3, 3] and asked[-1] > 3


def test_tools_are_built_within_a_running_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever builds them need not care."""
    in_memory(answering([]), monkeypatch)

    async def main() -> tuple[str, ...]:
        return build_tools({"m": {"type": "mcp", "command": ["x"]}}).names

    assert asyncio.run(main()) == ("t_a", "b")
