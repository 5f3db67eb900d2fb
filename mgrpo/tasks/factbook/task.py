"""The task "factbook": the task "research" in a world without the internet.

    [task]
    name = "factbook"
    options = { mode = "search", names = "invented", hops = [2], limits = { turns = 8 } }

Questions, corpus and tools are those of the world; everything else (formats, limits, prompts, scores) is that of the
task "research" and is set by its options. Reports are scored by the gold path and answers by the rule "gaia", unless
the options say otherwise.

Controls: search = "random" gives pages that have nothing to do with the query, "none" takes the tools away (closed
book); names = "invented" asks the same of a world whose names nobody knows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from mgrpo.config.settings import Settings, first_problem
from mgrpo.environments.task import QuestionSource
from mgrpo.tasks.factbook.chains import HOPS
from mgrpo.tasks.factbook.corpora import Mode, default_folder, open_corpus, world_tools
from mgrpo.tasks.factbook.examples import with_examples
from mgrpo.tasks.factbook.source import FactbookSource
from mgrpo.tasks.factbook.world import World
from mgrpo.tasks.research.task import ResearchTask
from mgrpo.tools.base import Tool
from mgrpo.types import MAIN

CLOSED_BOOK: Mapping[str, object] = {"search": "none", "examples": False}
"""The options of a control; examples would show a search."""


class WorldOptions(Settings):
    """What [task.options] of "factbook" has beside those of "research"."""

    mode: Mode = "search"
    """search: agents search and visit. links: there is no search; they follow links from the root page."""
    names: Literal["real", "invented"] = "real"
    """invented: names, demonyms and codes that nobody knows, in the place of all real ones (renaming.py)."""
    hops: list[int] = Field(default_factory=lambda: list(HOPS))
    """Facts that a question takes."""
    search: Literal["bm25", "random", "none"] = "bm25"
    """random: results that have nothing to do with the query. none: no tools at all."""
    world_seed: int = Field(0, ge=0)
    """Draws which chains are asked, and the invented names."""
    results: int = Field(5, ge=1, le=20)
    """Of a search."""
    page_chars: int = Field(4000, ge=200)
    """Characters of a part of a page."""
    examples: bool = False
    """Begin each chat with two worked examples, for a small model (examples.py); mode "search"."""
    cache: str | None = None
    """Folder of the corpus' file. Unset: $XDG_CACHE_HOME/mgrpo, or ~/.cache/mgrpo."""

    @model_validator(mode="after")
    def _is_searched(self) -> WorldOptions:
        if self.examples and (self.mode == "links" or self.search == "none"):
            raise ValueError(
                "examples = true shows a search, which there is only in the mode 'search' with tools"
            )
        if self.mode == "links" and self.search == "random":
            raise ValueError("search = 'random' has no effect in the mode 'links', which has no search")
        return self


class FactbookTask(ResearchTask):
    """See the module's docstring."""

    controls: MappingProxyType[str, Mapping[str, object]] = MappingProxyType(
        {"random search": {"search": "random"}, "closed book": CLOSED_BOOK}
    )

    def __init__(
        self, options: Mapping[str, object] = MappingProxyType({}), roles: Sequence[str] | None = None
    ) -> None:
        """Builds the world, and its corpus' file where there is none. Raises ValueError and ConfigError as
        ResearchTask, and where the factbook's data are missing."""
        self.world_options = _read({k: v for k, v in options.items() if k in WorldOptions.model_fields})
        rest: dict[str, Any] = {k: v for k, v in options.items() if k not in WorldOptions.model_fields}
        for key in ("questions", "tools"):
            if rest.get(key):
                raise ValueError(f"options.{key} is set; the factbook has its own, use the task research")
        if isinstance(score := rest.get("score", {}), Mapping):
            rest["score"] = {"expert": "path"} | dict(score)
        if self.world_options.mode == "links":
            self.controls = MappingProxyType({"closed book": CLOSED_BOOK})
        self.world = _world(self.world_options.names == "invented", self.world_options.world_seed)
        super().__init__(rest, roles)
        if self.world_options.examples:
            self.team = with_examples(self.team, self.options.format)
            first = tuple(message["role"] for message in self.team[MAIN].messages("?"))
            self.chat_use = replace(self.chat_use, first=first)

    def make_questions(self) -> QuestionSource:
        return FactbookSource(self.world, self.world_options.hops)

    def own_tools(self) -> Sequence[Tool]:
        options = self.world_options
        if options.search == "none":
            return ()
        folder = default_folder() if options.cache is None else Path(options.cache)
        corpus = open_corpus(self.world, options.mode, folder)
        return world_tools(corpus, options.mode, options.search, options.results, options.page_chars)


@functools.lru_cache(maxsize=2)  # the tasks of a run's stages and controls share it
def _world(renamed: bool, seed: int) -> World:
    return World.build(renamed, seed)


def _read(options: Mapping[str, object]) -> WorldOptions:
    try:
        return WorldOptions.model_validate(options)
    except ValidationError as error:
        raise ValueError(first_problem(error, "options")) from None
