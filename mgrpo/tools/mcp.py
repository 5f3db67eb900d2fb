"""`type = "mcp"`: the tools of an MCP server, over stdio (`command`) or streamable HTTP (`url`).

The server is asked for its tools when a run starts, by a connection that is closed again; calls share one session,
which the first of them opens (mgrpo/tools/mcp_session.py). With a cassette both are recorded, so that a replay needs
neither server nor program.

A tool's answer may say that it is an error. MCP does not tell a mistake of the caller from a time-out behind the
server, so `failures` does: an error whose text one of these patterns is found in is infrastructure, tried again and
never seen by a policy. What other errors are, `errors` says.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.services.cassette import Cassette, canonical
from mgrpo.services.client import HttpService
from mgrpo.tools.base import Observation, Tool, occurrence
from mgrpo.tools.remote import (
    RemoteConfig,
    RemoteTool,
    checked_patterns,
    links_of,
    plain,
    rows,
    table,
    text_of,
)

if TYPE_CHECKING:
    from mgrpo.tools.mcp_session import McpTransport

FAILURES = [
    r"(?i)\btime[ds]?[ -]?out\b",
    r"(?i)\brate.?limit|\btoo many requests\b|\bquota\b|\boverloaded\b",
    r"(?i)\bconnection (error|refused|reset|closed|aborted)\b|\bname resolution\b",
    r"(?i)\b(temporarily|service) unavailable\b|\bbad gateway\b|\binternal (server )?error\b",
    r"\b(429|500|502|503|504)\b",
]
LISTING_OUTAGE = 60.0  # seconds that the list of tools is waited for when a run starts


class McpConfig(RemoteConfig):
    """type = "mcp": all tools of an MCP server; characters of their names beside letters, digits and _ become _."""

    type: Literal["mcp"]
    url: str = ""
    """Of a server over streamable HTTP, its path included: "http://10.0.0.5:8000/mcp". Or `command`."""
    command: list[str] = Field(default_factory=list)
    """Program and arguments of a server over stdio: ["uvx", "some-server"]. It is started once, and ended with the
    run."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the program. They are no place for keys: a run's config is written to its folder."""
    pass_env: list[str] = Field(default_factory=list)
    """Names of environment variables that the program gets from ours, e.g. of a key. Beside these it gets HOME, PATH
    and their like."""
    cwd: str | None = None
    """Folder that the program is started in; left out: that of the run."""
    errors: Literal["tool", "infrastructure"] = "tool"
    """What an answer is that says it is an error: "tool" shows its text to the agent."""
    failures: list[str] = Field(default_factory=lambda: list(FAILURES))
    """Patterns of errors that are infrastructure all the same; they are looked for anywhere in its text."""
    max_chars: int = Field(default=20_000, ge=200)
    """Characters of an answer that an agent gets; what comes after them is cut off."""

    @field_validator("failures")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        return checked_patterns(patterns)

    @model_validator(mode="after")
    def _one_way(self) -> McpConfig:
        if bool(self.url) == bool(self.command):
            raise ValueError("expected either url or command")
        if self.command and (self.key_env is not None or self.headers):
            raise ValueError("key_env and headers are for url; a command gets keys by pass_env")
        if self.url and (self.env or self.pass_env or self.cwd is not None):
            raise ValueError("env, pass_env and cwd are for command")
        return self

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        listed = _listed(self, name, cassette)
        service = self._service(name, cassette, self.max_outage)
        names = [re.sub(r"\W", "_", str(entry["name"])) for entry in listed]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ConfigError(f"two tools of the server are named {twice[0]!r}")
        return [McpTool(self, service, cassette, n, entry) for n, entry in zip(names, listed, strict=True)]

    def _service(self, name: str, cassette: Cassette | None, max_outage: float) -> HttpService:
        # The address of a process is for messages alone.
        url = self.url or f"http://{re.sub(r'[^a-zA-Z0-9-]', '-', name)}.stdio"
        config = self.model_copy(update={"url": url, "max_outage": min(max_outage, self.max_outage)})
        return HttpService(name, config, cassette, transport=self._transport(name))

    def _transport(self, name: str) -> McpTransport:
        try:
            from mgrpo.tools import mcp_session as session
        except ModuleNotFoundError as error:
            raise ConfigError(f'type = "mcp" needs {error.name}; pip install "mgrpo[research]"') from None

        def connect(headers: Mapping[str, str]) -> Any:
            if self.command:
                return session.over_stdio(self.command, self.env, self.pass_env, self.cwd)
            return session.over_http(self.url, headers, self.timeout)

        return session.McpTransport(name, connect, self.timeout)

    def read(self, raw: Any) -> tuple[str, tuple[str, ...], bool]:
        """(text, links, is an error) of an answer. Raises ValueError for an error that is infrastructure, and for any
        other shape."""
        answer = table(raw, "the answer")
        text, links, wrong = text_of(answer, "text", needed=True), answer.get("links"), answer.get("is_error")
        if not isinstance(links, list) or not isinstance(wrong, bool):
            raise ValueError("the answer has no links or no is_error")
        if wrong and (
            self.errors == "infrastructure" or any(re.search(pattern, text) for pattern in self.failures)
        ):
            raise ValueError(f"an error that is infrastructure: {text[:100]!r}")
        return text, tuple(map(str, links)), wrong


class McpTool(RemoteTool):
    """One tool of a server."""

    def __init__(
        self,
        config: McpConfig,
        service: HttpService,
        cassette: Cassette | None,
        name: str,
        listed: Mapping[str, Any],
    ) -> None:
        super().__init__(config, service, cassette)
        self._config, self._own_name = config, str(listed["name"])
        self.name, self.description, self.parameters = name, listed["description"], listed["parameters"]
        self.version = hashlib.sha256(canonical(listed).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        reply = await self._service.request(
            "POST",
            "/tools/call",
            self._config.read,
            json={"name": self._own_name, "arguments": _plain(dict(arguments))},
            pure=self.pure,
            occurrence=occurrence.get(),
        )
        text, links, wrong = reply.value
        most = self._config.max_chars
        if len(text) > most:
            text = f"{text[:most]}\n[cut: the first {most} characters]"
        if wrong:
            return Observation(text or "The call failed.", (), "tool_error", reply.source, reply.seconds)
        status: Literal["ok", "empty"] = "ok" if text.strip() else "empty"
        every = tuple(dict.fromkeys((*links, *links_of(text))))
        return Observation(text, every, status, reply.source, reply.seconds)


def _listed(config: McpConfig, name: str, cassette: Cassette | None) -> list[dict[str, Any]]:
    """What a server says of its tools. Raises ConfigError where it does not."""

    async def ask() -> list[dict[str, Any]]:
        service = config._service(name, cassette, LISTING_OUTAGE)
        try:
            return (await service.request("POST", "/tools/list", _read_list)).value
        finally:
            await service.close()

    config._transport(name)  # says what is not installed
    found: list[list[dict[str, Any]]] = []
    wrong: list[Exception] = []

    def run() -> None:
        try:
            found.append(asyncio.run(ask()))
        except Exception as error:
            wrong.append(error)

    # A thread has no loop, so that this works within one that runs as well; its waits have bounds of their own.
    thread = threading.Thread(target=run, name=f"mcp-{name}", daemon=True)
    thread.start()
    thread.join()
    if wrong:
        if isinstance(wrong[0], InfrastructureError):
            raise ConfigError(f"the MCP server does not list its tools: {wrong[0]}") from wrong[0]
        raise wrong[0]
    return found[0]


def _read_list(raw: Any) -> list[dict[str, Any]]:
    found = rows(table(raw, "the answer").get("tools"), "tools")
    for entry in found:
        text_of(entry, "name", needed=True)
        text_of(entry, "description", needed=True)
        table(entry.get("parameters"), "parameters")
    return found


def _plain(value: Any) -> Any:
    """A JSON value without halves of surrogate pairs."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
