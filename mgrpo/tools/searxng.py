"""`type = "searxng"`: a SearXNG of one's own: GET /search?q&format=json -> results[{title, url, content}].

Two of its habits matter: JSON is off as it comes (403), and engines that fail leave an empty answer with status 200,
which says so in unresponsive_engines: infrastructure, not "nothing found".
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mgrpo.tools.base import Result
from mgrpo.tools.remote import Ask, SearchConfig, rows, table, text_of

FORBIDDEN = {403: 'gives no JSON: its settings.yml needs search.formats = ["html", "json"]'}


class SearxngConfig(SearchConfig):
    """type = "searxng": the tool `search` over a SearXNG server."""

    type: Literal["searxng"]
    language: str = ""
    """E.g. "en"; empty: the server's own."""
    engines: list[str] = Field(default_factory=list)
    """Engines to ask, e.g. ["wikipedia"]; empty: the server's own."""
    categories: list[str] = Field(default_factory=list)
    """Categories to search, e.g. ["general"]; empty: the server's own."""

    def ask(self, query: str) -> Ask:
        params: dict[str, object] = {"q": query, "format": "json"}
        chosen = {
            "language": self.language,
            "engines": ",".join(self.engines),
            "categories": ",".join(self.categories),
        }
        params |= {key: value for key, value in chosen.items() if value}
        return Ask("GET", "/search", params=params, fatal=FORBIDDEN)

    def read(self, raw: Any) -> list[Result]:
        answer = table(raw, "the answer")
        found = [
            Result(text_of(entry, "title"), text_of(entry, "url", needed=True), text_of(entry, "content"))
            for entry in rows(answer.get("results"), "results")
        ]
        if not found and (silent := answer.get("unresponsive_engines")):
            raise ValueError(f"no results, and engines that do not answer: {silent!r:.100}")
        return found
