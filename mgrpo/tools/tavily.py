"""`type = "tavily"`: POST /search {query, max_results} -> results[{title, url, content}], and the reader POST /extract
{urls} -> results[{url, raw_content}], failed_results[{url}]: a page of the latter is the policy's matter.

Tavily's own answer to the query is not asked for. 432 and 433 are limits of a plan that is used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mgrpo.services.failures import ServiceAnswer
from mgrpo.tools.base import Result, Tool
from mgrpo.tools.page import Page
from mgrpo.tools.remote import (
    UNREADABLE,
    Ask,
    RemoteSearch,
    RemoteVisit,
    SearchConfig,
    VisitConfig,
    rows,
    table,
    text_of,
)

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

USED_UP = dict.fromkeys((432, 433), "the plan's limit is used up")


class TavilyConfig(SearchConfig, VisitConfig):
    """type = "tavily": the tools `search` and `visit`."""

    type: Literal["tavily"]
    url: str = "https://api.tavily.com"
    key_env: str | None = "TAVILY_API_KEY"
    depth: Literal["basic", "advanced"] = "basic"
    """Of searches and pages; "advanced" costs twice as much."""

    most_query = 400

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        service = self.service(name, cassette)
        return [RemoteSearch(self, service, cassette), RemoteVisit(self, service, cassette)]

    def ask(self, query: str) -> Ask:
        body = {"query": query, "max_results": self.k, "search_depth": self.depth, "include_answer": False}
        return Ask("POST", "/search", json=body, fatal=USED_UP)

    def read(self, raw: Any) -> list[Result]:
        return [
            Result(text_of(entry, "title"), text_of(entry, "url", needed=True), text_of(entry, "content"))
            for entry in rows(table(raw, "the answer").get("results"), "results")
        ]

    def ask_page(self, url: str) -> Ask:
        body = {"urls": [url], "extract_depth": self.depth, "format": "markdown"}
        return Ask("POST", "/extract", json=body, fatal=USED_UP)

    def read_page(self, raw: Any, url: str) -> Page:
        answer = table(raw, "the answer")
        for entry in rows(answer.get("results"), "results"):
            found = text_of(entry, "url") or url
            return Page(found, text_of(entry, "title"), text_of(entry, "raw_content"))
        if not rows(answer.get("failed_results"), "failed_results"):
            raise ValueError("neither a page nor one that failed")
        raise ServiceAnswer(404, UNREADABLE)
