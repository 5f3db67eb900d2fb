"""The world's pages as the corpus that agents search and visit, made once and kept as a file.

    search   all section pages, without links: agents search, then visit
    links    the same with their links, and the index pages: agents begin at the root page and follow links

A file is named by what it holds, so runs of the same world share it. Making one takes about three seconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mgrpo.errors import ConfigError
from mgrpo.tasks.factbook.pages import ROOT
from mgrpo.tasks.factbook.world import World
from mgrpo.tools.base import Tool
from mgrpo.tools.corpus import FORMAT, Corpus
from mgrpo.tools.corpus_tools import CorpusVisit, Ranking, corpus_tools
from mgrpo.tools.page import Page

Mode = Literal["search", "links"]


def default_folder() -> Path:
    """Where corpora are kept: $XDG_CACHE_HOME/mgrpo, by default ~/.cache/mgrpo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mgrpo"


def open_corpus(world: World, mode: Mode, folder: Path) -> Corpus:
    """The corpus of a world, from its file in `folder` or made anew. Raises ConfigError where it cannot be written."""
    path = folder / f"factbook-{mode}-{world.digest}-{FORMAT}.sqlite"
    with contextlib.suppress(ConfigError):  # none yet, or not readable
        return Corpus.open(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Corpus.build(path, mode_pages(world, mode))
    except OSError as error:
        raise ConfigError(f"the factbook's corpus {path}: {error}") from error


def mode_pages(world: World, mode: Mode) -> Iterator[Page]:
    """What agents can see in a mode."""
    if mode == "links":
        yield from world.index
        yield from world.pages
    else:
        yield from (replace(page, links=()) for page in world.pages)


def world_tools(corpus: Corpus, mode: Mode, ranking: Ranking, k: int, page_chars: int) -> Sequence[Tool]:
    """search and visit; in the mode "links" visit alone, whose description names the root page."""
    tools = corpus_tools(corpus, k=k, page_chars=page_chars, ranking=ranking)
    if mode == "search":
        return tools
    (visit,) = (tool for tool in tools if isinstance(tool, CorpusVisit))
    visit.description += f" Begin at {ROOT}/, which lists regions, and follow links."
    return [visit]
