"""`type = "serper"`: Google's results: POST /search {q, num, gl, hl} -> organic[{title, link, snippet}].

Serper answers a key without credits with status 400, which is otherwise a bad request: told apart by its words.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mgrpo.errors import ServiceError
from mgrpo.services.failures import ServiceFailure
from mgrpo.tools.base import Result
from mgrpo.tools.remote import Ask, SearchConfig, rows, table, text_of


class SerperConfig(SearchConfig):
    """type = "serper": the tool `search` over Google's results."""

    type: Literal["serper"]
    url: str = "https://google.serper.dev"
    key_env: str | None = "SERPER_API_KEY"
    country: str = ""
    """Google's gl, e.g. "us"; empty: Serper's own."""
    language: str = ""
    """Google's hl, e.g. "en"; empty: Serper's own."""
    answer_box: bool = False
    """Show Google's own answer as the first result. Off: it may be the answer that agents are to search for."""

    key_header: ClassVar[str] = "X-API-KEY"

    def ask(self, query: str) -> Ask:
        body: dict[str, object] = {"q": query, "num": self.k}
        body |= {key: value for key, value in (("gl", self.country), ("hl", self.language)) if value}
        return Ask("POST", "/search", json=body)

    def read(self, raw: Any) -> list[Result]:
        answer = table(raw, "the answer")
        if "organic" not in answer and "searchParameters" in answer:
            return []  # nothing was found
        found = [
            Result(text_of(entry, "title"), text_of(entry, "link", needed=True), text_of(entry, "snippet"))
            for entry in rows(answer.get("organic"), "organic")
        ]
        if self.answer_box and (box := answer.get("answerBox")) is not None:
            box = table(box, "answerBox")
            said = text_of(box, "answer") or text_of(box, "snippet")
            found.insert(0, Result(text_of(box, "title") or "Answer", text_of(box, "link"), said))
        return found

    def judge(self, failure: ServiceFailure) -> Exception:
        if failure.status == 400 and "credits" in failure.words.lower():
            return ServiceError(f"serper at {self.url}: the key in ${self.key_env} has no credits left")
        return failure
