"""`type = "corpus"`: search and visit over a corpus file, without a network."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mgrpo.errors import ConfigError
from mgrpo.tools.base import Observation, Result, Tool, ToolError
from mgrpo.tools.corpus import Corpus
from mgrpo.tools.page import Part, excerpt, parts
from mgrpo.tools.registry import ToolConfig

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

Ranking = Literal["bm25", "random"]
MOST = 20  # results that an agent may ask for


class CorpusConfig(ToolConfig):
    """type = "corpus": the tools `search` and `visit` over a file of mgrpo tools index."""

    type: Literal["corpus"]
    path: Path = Field(strict=False)
    """The corpus' file."""
    k: int = Field(default=5, ge=1, le=MOST)
    """Results of a search."""
    page_chars: int = Field(default=4000, ge=200)
    """Characters of a part of a page."""
    digest: str = ""
    """The corpus' digest, or its beginning, where the run depends on it; another one is refused."""
    ranking: Ranking = "bm25"
    """"random" gives pages that have nothing to do with the query: a control."""

    def tools(self, name: str, cassette: Cassette | None) -> Sequence[Tool]:
        corpus = Corpus.open(self.path)
        if not corpus.digest.startswith(self.digest):
            corpus.close()
            raise ConfigError(f"tools.{name}.digest {self.digest!r}: {self.path} has {corpus.digest!r}")
        return corpus_tools(corpus, k=self.k, page_chars=self.page_chars, ranking=self.ranking)


def corpus_tools(
    corpus: Corpus, *, k: int = 5, page_chars: int = 4000, ranking: Ranking = "bm25"
) -> list[Tool]:
    """The tools `search` and `visit`; closing one closes the corpus. page_chars: of a part's text and links."""
    return [CorpusSearch(corpus, k, ranking), CorpusVisit(corpus, page_chars)]


class CorpusSearch(Tool):
    """search(query): the best pages with snippets."""

    name = "search"
    description = "Search for pages. Gives the best pages with title, address and an excerpt."

    def __init__(self, corpus: Corpus, k: int, ranking: Ranking = "bm25") -> None:
        self._corpus, self._k, self._ranking, self.version = corpus, k, ranking, corpus.digest
        query = {"type": "string", "description": "What to look for, in words."}
        self.parameters = _object({"query": query}, ["query"])

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        query = str(arguments["query"])
        if not query.strip():
            raise ToolError("The query is empty.")
        find = self._corpus.search if self._ranking == "bm25" else self._corpus.random
        hits = await asyncio.to_thread(find, query, self._k)
        return Observation.of_results([Result(hit.title, hit.url, hit.snippet) for hit in hits])

    async def close(self) -> None:
        self._corpus.close()


class CorpusVisit(Tool):
    """visit(url, part?, goal?): a page in parts, or its passages nearest to a goal."""

    name = "visit"
    description = (
        "Read a page. A long page has parts; with a goal, its passages nearest to the goal are shown."
    )

    def __init__(self, corpus: Corpus, page_chars: int) -> None:
        self._corpus, self._chars, self.version = corpus, page_chars, corpus.digest
        url = {"type": "string", "description": "Address of the page, from a search or a link."}
        part = {"type": "integer", "minimum": 1, "description": "Which part of a long page; the first is 1."}
        goal = {"type": "string", "description": "What you want to know from the page."}
        self.parameters = _object({"url": url, "part": part, "goal": goal}, ["url"])

    async def call(self, arguments: Mapping[str, object]) -> Observation:
        part, goal = arguments.get("part"), str(arguments.get("goal", ""))
        shown = await asyncio.to_thread(self._part, str(arguments["url"]), part, goal)
        return Observation(shown.text, shown.links, "ok" if shown.text.strip() else "empty")

    async def close(self) -> None:
        self._corpus.close()

    def _part(self, url: str, part: object, goal: str) -> Part:
        page = self._corpus.page(url)
        if page is None:
            known = " ".join(re.sub(r"[\x00-\x1f]", " ", url).split())[:200]
            raise ToolError(f"There is no page {known!r}. Use an address from a search or a link.")
        whole = parts(page, self._chars)
        long = len(whole) > 1
        if part is None and goal and long and (spans := self._corpus.nearest(page, goal, self._chars)):
            return excerpt(page, spans)
        number = int(part) if isinstance(part, int | float) else 1
        if number > len(whole):
            raise ToolError(f"There is no part {part}: the page has {len(whole)}.")
        return whole[number - 1]


def _object(properties: Mapping[str, object], required: Sequence[str]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }
