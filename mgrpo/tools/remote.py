"""Tools over a service outside the run: what a client of one search or reader API has to say, and the rest for all.

A client is one class, a SearchConfig or a VisitConfig or both: its keys, the request for a query or an address (ask,
ask_page), and how an answer is read (read, read_page). Both directions are pure functions. Everything else is here:

    search(query)      numbered results with title, address and snippet
    visit(url, part?)  a page as text, in parts of page_chars characters, cut at max_chars

What a policy gets to read is either of the service's results or fixed words of ours. A status that `Ask.answers` names,
and a page that fails after all its attempts while the service answers other requests, is a tool_error with such words
and recorded like any answer; what else fails is infrastructure and never an observation (mgrpo/services/failures.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from mgrpo.errors import ConfigError
from mgrpo.services.client import HttpService, Request
from mgrpo.services.config import ServiceConfig
from mgrpo.services.failures import ServiceAnswer, ServiceFailure, Source
from mgrpo.tools.base import Observation, Result, Tool, ToolError, occurrence
from mgrpo.tools.page import Page, parts
from mgrpo.tools.registry import ToolConfig

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

UNREADABLE = "The page cannot be read. Try another one."
MISSING = {status: f"There is no such page (status {status})." for status in (404, 410, 451)}
"""Answers of a reader that are the policy's matter."""
MOST_QUERY = 1000  # characters of a query
MOST_URL = 2000  # characters of an address
MOST_LINKS = 200  # of one observation
_LINK = re.compile(r"https?://[^\s<>\"'()\[\]{}|\\^`]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request without address and key. path: after the service's url. answers: statuses that are the policy's matter,
    with the words for it. fatal: statuses that end the run."""

    method: str
    path: str
    json: object = None
    params: Mapping[str, object] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[int, str] = field(default_factory=dict)
    fatal: Mapping[int, str] = field(default_factory=dict)


class RemoteConfig(ToolConfig, ServiceConfig):
    """Base of the types that stand on a service: where it is, its key, how long it is waited for."""

    pure: bool = True
    """The same call gives the same answer for the whole run, so that one recording on the cassette serves all. false:
    each occurrence of a call is recorded for itself."""

    key_header: ClassVar[str] = "Authorization"
    """The header that carries the key; "Bearer KEY" where it is Authorization."""

    def service(self, name: str, cassette: Cassette | None) -> HttpService:
        """The service of an entry; one for all its tools."""
        return HttpService(name, self, cassette, key_header=self.key_header)


class SearchConfig(RemoteConfig):
    """Base of the types with a tool `search`."""

    k: int = Field(default=5, ge=1, le=20)
    """Results of a search."""
    snippet_chars: int = Field(default=500, ge=1)
    """Characters of a result's snippet."""

    most_query: ClassVar[int] = MOST_QUERY
    most_words: ClassVar[int] = MOST_QUERY

    @abstractmethod
    def ask(self, query: str) -> Ask:
        """The request for a query of at most most_query characters, most_words words and no control characters."""

    @abstractmethod
    def read(self, raw: Any) -> list[Result]:
        """The results of an answer, best first. Raises ValueError for any other shape."""

    def judge(self, failure: ServiceFailure) -> Exception:
        """What a search that failed means, where the service says it in its own way: see Serper's credits."""
        return failure

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        return [RemoteSearch(self, self.service(name, cassette), cassette)]


class VisitConfig(RemoteConfig):
    """Base of the types with a tool `visit`."""

    page_chars: int = Field(default=4000, ge=200)
    """Characters of a part of a page."""
    max_chars: int = Field(default=200_000, ge=200)
    """Characters of a page that are kept; what comes after them is cut off."""

    any_address: ClassVar[bool] = False
    """Pages have whatever names the service gives them, not only addresses of the web."""

    @abstractmethod
    def ask_page(self, url: str) -> Ask:
        """The request for a page; url as address() gives it."""

    @abstractmethod
    def read_page(self, raw: Any, url: str) -> Page:
        """The page of an answer, its url where it was found. Raises ValueError for any other shape, ServiceAnswer where
        the answer says that there is no such page."""


class RemoteTool(Tool):
    """What search and visit have in common."""

    def __init__(self, config: RemoteConfig, service: HttpService, cassette: Cassette | None) -> None:
        self._service, self._cassette = service, cassette
        self.pure = config.pure

    async def preflight(self) -> None:
        check_key(self._service.name, self._service.config, self._cassette)

    async def close(self) -> None:
        await self._service.close()


class RemoteSearch(RemoteTool):
    """search(query): the best results of a service."""

    name = "search"
    description = "Search the web. Gives the best pages with title, address and an excerpt."
    parameters: Mapping[str, object] = {
        "type": "object",
        "properties": {"query": {"type": "string", "description": "What to look for, in words."}},
        "required": ["query"],
        "additionalProperties": False,
    }

    def __init__(self, config: SearchConfig, service: HttpService, cassette: Cassette | None) -> None:
        super().__init__(config, service, cassette)
        self._config = config

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        query = words(str(arguments["query"]))
        most, most_words = self._config.most_query, self._config.most_words
        if not query:
            raise ToolError("The query is empty.")
        if len(query) > most or len(query.split()) > most_words:
            bound = f"{most} characters" + (f" and {most_words} words" if most_words < most else "")
            raise ToolError(f"The query is too long: at most {bound}.")
        ask = self._config.ask(query)
        try:
            reply = await self._service.request(
                ask.method,
                ask.path,
                self._config.read,
                json=ask.json,
                params=ask.params,
                headers=ask.headers,
                pure=self.pure,
                occurrence=occurrence.get(),
                answers=ask.answers,
                fatal=ask.fatal,
            )
        except ServiceAnswer as answer:
            return Observation(answer.words, status="tool_error", source=answer.source)
        except ServiceFailure as failure:
            meant = self._config.judge(failure)
            if meant is failure:
                raise
            raise meant from failure
        most = self._config.snippet_chars
        found = [Result(r.title[:most], r.url, r.snippet[:most]) for r in reply.value[: self._config.k]]
        return Observation.of_results(found, reply.source, reply.seconds)


class RemoteVisit(RemoteTool):
    """visit(url, part?): a page that a service reads, in parts."""

    name = "visit"
    description = "Read a page as text. A long page has parts."
    parameters: Mapping[str, object] = {
        "type": "object",
        "properties": {
            "url": {"type": "string", "description": "Address of the page, from a search or a link."},
            "part": {
                "type": "integer",
                "minimum": 1,
                "description": "Which part of a long page; the first is 1.",
            },
        },
        "required": ["url"],
        "additionalProperties": False,
    }

    def __init__(self, config: VisitConfig, service: HttpService, cassette: Cassette | None) -> None:
        super().__init__(config, service, cassette)
        self._config = config
        self._reads = False  # it has read a page: the reader works

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        part = arguments.get("part", 1)
        number = int(part) if isinstance(part, int | float) else 1
        url = str(arguments["url"])
        asked = words(url) if self._config.any_address else address(url)
        if not asked or len(asked) > MOST_URL:
            raise ToolError("This is no address of a page. Use one from a search or a link.")
        try:
            page, is_cut, source = await self._page(asked)
        except ServiceAnswer as answer:
            return Observation(answer.words, status="tool_error", source=answer.source)
        whole = await asyncio.to_thread(parts, page, self._config.page_chars)
        if number > len(whole):
            raise ToolError(f"There is no part {number}: the page has {len(whole)}.")
        text = whole[number - 1].text
        if is_cut and number == len(whole):
            text = f"{text.rstrip()}\n\n[cut: the first {self._config.max_chars} characters of the page]"
        # A page that was found elsewhere is a result, so that a block list sees the address it came from.
        moved = (Result(page.title, page.url, text),) if page.url != asked else ()
        status = "ok" if page.text.strip() else "empty"
        return Observation(text, links_of(text), status, source, results=moved)  # type: ignore[arg-type]

    async def _page(self, url: str) -> tuple[Page, bool, Source]:
        """A page, whether it is cut, and where it came from. What the cassette keeps is the page, cut: a reader sends a
        hundred times as much."""
        ask, most = self._config.ask_page(url), self._config.max_chars
        request = Request(
            ask.method,
            ask.path,
            lambda raw: self._config.read_page(raw, url),
            ask.json,
            ask.params,
            ask.headers,
            ask.answers,
            ask.fatal,
            as_text=False,
        )

        async def call() -> object:
            try:
                raw = await self._service.live(request, repeatable=self.pure)
            except ServiceFailure as failure:
                if failure.others and self._reads and failure.status != 429:  # the page's doing
                    raise ServiceAnswer(failure.status or 504, UNREADABLE) from failure
                raise
            page = self._config.read_page(raw, url)
            self._reads = True
            return [page.url, page.title[:most], page.text[:most], len(page.text) > most]

        kept, source = await self._service.recorded(
            request.canonical(), call, pure=self.pure, occurrence=occurrence.get()
        )
        found, title, text, is_cut = kept
        return Page(str(found), str(title), str(text)), bool(is_cut), source


def check_key(name: str, config: ServiceConfig, cassette: Cassette | None) -> None:
    """Raises ConfigError where a service has no key that it needs; a replay needs none."""
    if cassette is not None and cassette.mode == "replay":
        return
    if config.key_env is not None and not os.environ.get(config.key_env, "").strip():
        raise ConfigError(f"tools.{name}.key_env: the environment variable {config.key_env} is not set")


def plain(text: str) -> str:
    """text without halves of surrogate pairs, which no request can carry."""
    return text.encode("utf-8", "replace").decode()


def words(text: str) -> str:
    """text in one line, without control characters."""
    return " ".join(_CONTROL.sub(" ", plain(text)).split())


def address(text: str) -> str:
    """An address of the web without its fragment, "https://" before it where no scheme stands there; "" for what is
    none. Addresses of the reader's own network are none: a policy has nothing to look for there."""
    url = words(text).strip("<>\"'").partition("#")[0]
    if "://" not in url:
        url = f"https://{url}"
    try:
        split = urlsplit(url)
        host, _ = split.hostname or "", split.port
    except ValueError:
        return ""
    if split.scheme.lower() not in ("http", "https") or "@" in split.netloc or " " in url or "\\" in url:
        return ""
    try:
        return url if ipaddress.ip_address(host).is_global else ""
    except ValueError:
        return url if "." in host.strip(".") and not host.endswith((".local", ".internal")) else ""


def links_of(text: str) -> tuple[str, ...]:
    """The addresses that a text names, each once, in order."""
    found = dict.fromkeys(link.rstrip(".,;:!?*_") for link in _LINK.findall(text))
    return tuple(found)[:MOST_LINKS]


def checked_patterns(patterns: list[str]) -> list[str]:
    """Regular expressions. Raises ValueError for one that is none, or that everything matches."""
    for pattern in patterns:
        try:
            matches_all = re.match(pattern, "") is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if matches_all:
            raise ValueError(f"{pattern!r} would match every text")
    return patterns


# -- reading answers --------------------------------------------------------------------------------------------------


def table(raw: object, what: str) -> dict[str, Any]:
    """raw as a JSON object. Raises ValueError naming what it is not."""
    if not isinstance(raw, dict):
        raise ValueError(f"{what} is of type {type(raw).__name__}, expected an object")
    return raw


def rows(raw: object, what: str) -> list[dict[str, Any]]:
    """raw as a list of JSON objects. Raises ValueError naming what it is not."""
    if not isinstance(raw, list):
        raise ValueError(f"{what} is of type {type(raw).__name__}, expected a list")
    return [table(entry, f"an entry of {what}") for entry in raw]


def text_of(entry: Mapping[str, Any], key: str, *, needed: bool = False) -> str:
    """A text of an entry; "" where it is null or missing and not needed. Raises ValueError otherwise."""
    found = entry.get(key)
    if found is None and not needed:
        return ""
    if not isinstance(found, str):
        raise ValueError(f"{key} is of type {type(found).__name__}, expected text")
    return found
