"""`type = "jina"`: the reader r.jina.ai: GET /URL, Accept: application/json -> data{title, url, content, warning}.

400 (no address), 422 (a file, or a page that does not load), 404, 410 and 451 are the policy's matter. So is a page
whose own server answered with an error: Jina gives it as an answer with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from mgrpo.services.failures import ServiceAnswer
from mgrpo.tools.base import Tool
from mgrpo.tools.page import Page
from mgrpo.tools.remote import MISSING, UNREADABLE, Ask, RemoteVisit, VisitConfig, table, text_of

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

ANSWERS = MISSING | {
    400: "This is no address of a page that can be read.",
    422: "This address is no page that can be read: it does not load, or is a file of another kind.",
}
_TARGET = re.compile(r"target url returned error (\d{3})", re.IGNORECASE)


class JinaConfig(VisitConfig):
    """type = "jina": the tool `visit` over Jina's reader."""

    type: Literal["jina"]
    url: str = "https://r.jina.ai"
    engine: Literal["", "browser", "direct", "cf-browser-rendering"] = ""
    """How pages are loaded; empty: Jina's own choice."""
    images: bool = False
    """Keep images, as links with their captions."""

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        return [RemoteVisit(self, self.service(name, cassette), cassette)]

    def ask_page(self, url: str) -> Ask:
        headers = {"Accept": "application/json"}
        if self.engine:
            headers["X-Engine"] = self.engine
        if not self.images:
            headers["X-Retain-Images"] = "none"
        return Ask("GET", "/" + quote(url, safe="/:?&=%+,;@!$'()*~[]-._"), headers=headers, answers=ANSWERS)

    def read_page(self, raw: Any, url: str) -> Page:
        data = table(table(raw, "the answer").get("data"), "data")
        if failed := _TARGET.search(text_of(data, "warning")):
            status = int(failed[1])
            raise ServiceAnswer(status, MISSING.get(status, UNREADABLE))
        content = text_of(data, "content", needed=True)
        return Page(text_of(data, "url") or url, text_of(data, "title"), content)
