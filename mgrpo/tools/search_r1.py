"""`type = "search_r1"`: the retriever of Search-R1, which many trainers and `mgrpo tools serve` speak.

    POST /retrieve {queries, topk, return_scores: true}   {result: [[{document: {id, contents}, score}]]}, or bare
                                                          documents from servers that know no scores
    POST /access {urls}                                   {result: [{contents} or null]}, with visit = true

contents is "title\\ntext", the title often in quotes. A document is named by its url where it has one, else by its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from mgrpo.services.failures import ServiceAnswer
from mgrpo.tools.base import Result, Tool
from mgrpo.tools.page import Page
from mgrpo.tools.remote import (
    MISSING,
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


class SearchR1Config(SearchConfig, VisitConfig):
    """type = "search_r1": the tool `search`, and `visit` where the server has /access."""

    type: Literal["search_r1"]
    snippet_chars: int = 2000
    visit: bool = False
    """The server answers POST /access: agents get the tool `visit`."""

    any_address = True

    @field_validator("url")
    @classmethod
    def _without_path(cls, url: str) -> str:
        if url.endswith(("/retrieve", "/access")):
            raise ValueError(f"url {url!r}: leave out {url[url.rindex('/') :]}, it is added")
        return url

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        service = self.service(name, cassette)
        search = RemoteSearch(self, service, cassette)
        return [search, RemoteVisit(self, service, cassette)] if self.visit else [search]

    def ask(self, query: str) -> Ask:
        return Ask("POST", "/retrieve", json={"queries": [query], "topk": self.k, "return_scores": True})

    def read(self, raw: Any) -> list[Result]:
        found = table(raw, "the answer").get("result")
        if not isinstance(found, list) or len(found) != 1:
            raise ValueError("result is no list of one list")
        return [_result(entry) for entry in rows(found[0], "result[0]")]

    def ask_page(self, url: str) -> Ask:
        return Ask("POST", "/access", json={"urls": [url]}, answers=MISSING)

    def read_page(self, raw: Any, url: str) -> Page:
        found = table(raw, "the answer").get("result")
        if not isinstance(found, list) or len(found) != 1:
            raise ValueError("result is no list of one page")
        if found[0] is None:
            raise ServiceAnswer(404, "There is no such page. Use an address from a search or a link.")
        page = table(found[0], "the page")
        title, text = split_contents(text_of(page, "contents", needed=True))
        return Page(text_of(page, "url") or url, text_of(page, "title") or title, text)


def _result(entry: dict[str, Any]) -> Result:
    document = table(entry["document"], "document") if "document" in entry else entry
    title, text = split_contents(text_of(document, "contents", needed=True))
    name = document.get("id", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"id is of type {type(name).__name__}, expected text or a number")
    return Result(text_of(document, "title") or title, text_of(document, "url") or str(name), text)


def split_contents(contents: str) -> tuple[str, str]:
    """(title, text) of "title\\ntext", the title without quotes around it."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title, text.strip()
