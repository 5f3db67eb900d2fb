"""`type = "brave"`: Brave's web search: GET /res/v1/web/search?q&count -> web.results[{title, url, description}].

An answer without `web` found nothing. Queries of more than 400 characters or 50 words, which Brave refuses, are refused
here. Brave answers a key that it does not know with status 422, as a bad request: told apart by its words.
"""

from __future__ import annotations

import html
from typing import Any, ClassVar, Literal

from mgrpo.errors import ServiceError
from mgrpo.services.failures import ServiceFailure
from mgrpo.tools.base import Result
from mgrpo.tools.remote import Ask, SearchConfig, rows, table, text_of


class BraveConfig(SearchConfig):
    """type = "brave": the tool `search` over Brave's index."""

    type: Literal["brave"]
    url: str = "https://api.search.brave.com"
    key_env: str | None = "BRAVE_API_KEY"
    country: str = ""
    """E.g. "US"; empty: Brave's own."""
    language: str = ""
    """Brave's search_lang, e.g. "en"; empty: Brave's own."""

    key_header: ClassVar[str] = "X-Subscription-Token"
    most_query: ClassVar[int] = 400
    most_words: ClassVar[int] = 50

    def ask(self, query: str) -> Ask:
        params: dict[str, object] = {"q": query, "count": self.k, "text_decorations": "false"}
        params |= {
            key: value for key, value in (("country", self.country), ("search_lang", self.language)) if value
        }
        return Ask("GET", "/res/v1/web/search", params=params)

    def read(self, raw: Any) -> list[Result]:
        answer = table(raw, "the answer")
        if answer.get("type") != "search" and "query" not in answer and "web" not in answer:
            raise ValueError("the answer is no search: it has neither query nor web")
        if answer.get("web") is None:
            return []
        return [
            Result(
                html.unescape(text_of(entry, "title")),
                text_of(entry, "url", needed=True),
                html.unescape(text_of(entry, "description")),
            )
            for entry in rows(table(answer["web"], "web").get("results"), "web.results")
        ]

    def judge(self, failure: ServiceFailure) -> Exception:
        if failure.status == 422 and "token" in failure.words.lower():
            return ServiceError(f"brave at {self.url}: does not know the key in ${self.key_env}")
        return failure
