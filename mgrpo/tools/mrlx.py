"""`type = "mrlx"`: the tool server of MrlX: POST /retrieve {name: "search", query} or {name: "visit", url, goal} ->
{result: text}. Its text goes to the agent as it is.

The server gives failures of what stands behind it as texts with status 200. `failures` are patterns of such texts that
mean infrastructure, `unreadable` those of a page that cannot be read. Both are looked for at the beginning of a text,
after the line in which the server repeats address and goal, so that no page and no goal can imitate them.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from mgrpo.services.client import HttpService
from mgrpo.services.failures import ServiceAnswer
from mgrpo.tools.base import Observation, Tool, ToolError, occurrence
from mgrpo.tools.remote import (
    MOST_QUERY,
    MOST_URL,
    UNREADABLE,
    RemoteConfig,
    RemoteSearch,
    RemoteTool,
    address,
    checked_patterns,
    links_of,
    words,
)

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

FAILURES = [
    "Error:",
    "Error searching ",
    "Error visiting ",
    r"Evidence in page:\s+The LLM response was in an invalid",
]
UNREADABLE_PAGES = [r"Evidence in page:\s+The provided webpage content could not be accessed"]
NOTHING = "No results found for "


class MrlxConfig(RemoteConfig):
    """type = "mrlx": the tools `search` and `visit` of a MrlX tool server."""

    type: Literal["mrlx"]
    max_chars: int = Field(default=20_000, ge=200)
    """Characters of an answer that an agent gets; what comes after them is cut off."""
    failures: list[str] = Field(default_factory=lambda: list(FAILURES))
    """Patterns of texts that are failures of the server or of what stands behind it."""
    unreadable: list[str] = Field(default_factory=lambda: list(UNREADABLE_PAGES))
    """Patterns of texts that say that a page cannot be read; agents get fixed words instead."""

    @field_validator("url")
    @classmethod
    def _without_path(cls, url: str) -> str:
        if url.endswith("/retrieve"):
            raise ValueError(f"url {url!r}: leave out /retrieve, it is added")
        return url

    @field_validator("failures", "unreadable")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        return checked_patterns(patterns)

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        service = self.service(name, cassette)
        return [MrlxSearch(self, service, cassette), MrlxVisit(self, service, cassette)]

    def read(self, raw: Any, repeated: str = "") -> str:
        """The text of an answer. repeated: how it begins if it is about a page. Raises ValueError for a failure and any
        other shape, ServiceAnswer for a page that cannot be read."""
        text = raw.get("result") if isinstance(raw, dict) else None
        if not isinstance(text, str):
            raise ValueError("the answer has no result that is text")
        said = text.removeprefix(repeated).lstrip()
        if any(re.match(pattern, said) for pattern in self.failures):
            raise ValueError(f"a failure as text: {said[:100]!r}")
        if any(re.match(pattern, said) for pattern in self.unreadable):
            raise ServiceAnswer(404, UNREADABLE)
        return text


class MrlxTool(RemoteTool):
    """One tool of the server."""

    def __init__(self, config: MrlxConfig, service: HttpService, cassette: Cassette | None) -> None:
        super().__init__(config, service, cassette)
        self._config = config

    @abstractmethod
    def body(self, arguments: Mapping[str, object]) -> tuple[dict[str, object], str]:
        """The request's body, and how an answer to it begins. Raises ToolError."""

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        body, repeated = self.body(arguments)
        try:
            reply = await self._service.request(
                "POST",
                "/retrieve",
                lambda raw: self._config.read(raw, repeated),
                json=body,
                pure=self.pure,
                occurrence=occurrence.get(),
            )
        except ServiceAnswer as answer:
            return Observation(answer.words, status="tool_error", source=answer.source)
        text, most = reply.value, self._config.max_chars
        if len(text) > most:
            text = f"{text[:most]}\n[cut: the first {most} characters]"
        is_empty = not text.strip() or text.startswith(NOTHING)
        return Observation(
            text.strip(), links_of(text), "empty" if is_empty else "ok", reply.source, reply.seconds
        )


class MrlxSearch(MrlxTool):
    """search(query)."""

    name = "search"
    description = RemoteSearch.description
    parameters = RemoteSearch.parameters

    def body(self, arguments: Mapping[str, object]) -> tuple[dict[str, object], str]:
        query = words(str(arguments["query"]))
        if not query or len(query) > MOST_QUERY:
            raise ToolError(f"The query is {'too long' if query else 'empty'}: 1 to {MOST_QUERY} characters.")
        return {"name": "search", "query": query}, ""


class MrlxVisit(MrlxTool):
    """visit(url, goal)."""

    name = "visit"
    description = "Read a page with a goal. Gives what the page says about it."
    parameters: Mapping[str, object] = {
        "type": "object",
        "properties": {
            "url": {"type": "string", "description": "Address of the page, from a search."},
            "goal": {"type": "string", "description": "What you want to know from the page."},
        },
        "required": ["url", "goal"],
        "additionalProperties": False,
    }

    def body(self, arguments: Mapping[str, object]) -> tuple[dict[str, object], str]:
        url, goal = address(str(arguments["url"])), words(str(arguments["goal"]))
        if not url or len(url) > MOST_URL:
            raise ToolError("This is no address of a page. Use one from a search.")
        if not goal or len(goal) > MOST_QUERY:
            raise ToolError(f"The goal is {'too long' if goal else 'empty'}: 1 to {MOST_QUERY} characters.")
        repeated = f"The useful information in {url} for user goal {goal} as follows:"
        return {"name": "visit", "url": url, "goal": goal}, repeated
