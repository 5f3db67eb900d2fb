"""The world as one object: entries, names, facts, pages, questions. The same bit for bit on every machine.

    world = World.build()                  # about two seconds
    world.pages                            # 2,870 of them
    world.questions[0].text, .gold, .info["path"]

`renamed` puts invented names in the place of all entries' names, demonyms, adjectives and codes (renaming.py): what a
model knows by heart of the real ones does not help it. Chains and splits stay as they are. seed: draws the chains that
are asked, and the invented names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mgrpo.environments.task import Question
from mgrpo.tasks.factbook.chains import HOPS, Chain, all_chains, balanced
from mgrpo.tasks.factbook.data import Entry, read_entries
from mgrpo.tasks.factbook.facts import Facts, read_facts
from mgrpo.tasks.factbook.names import Names, by_name, entry_names
from mgrpo.tasks.factbook.pages import index_pages, region_title, section_pages
from mgrpo.tasks.factbook.questions import make_questions
from mgrpo.tools.page import Page

NOT_ASKED = ("ee", "xx")
"""The European Union and the world: their texts are about other entries."""


@dataclass(frozen=True)
class World:
    """See the module's docstring."""

    renamed: bool
    seed: int
    entries: tuple[Entry, ...]
    """Sorted by code."""
    names: Names
    regions: Mapping[str, str]
    """The package's name of a region -> its title."""
    facts: Facts
    chains: tuple[Chain, ...]
    """Of all splits; two hops before three."""

    @classmethod
    def build(cls, renamed: bool = False, seed: int = 0) -> World:
        """Read the package's data and make the world of it. Raises ConfigError where they are missing or others."""
        entries = read_entries()
        names = entry_names(entries)
        titles = {entry.region: region_title(entry.region) for entry in entries}
        if renamed:
            from mgrpo.tasks.factbook.renaming import rename

            changed = rename(entries, names, seed)
            entries, names = changed.entries, changed.names
            titles = {region: changed.text(title) for region, title in titles.items()}
        codes = by_name(names)
        facts = {
            (entry.code, relation): fact
            for entry in entries
            if entry.code not in NOT_ASKED
            for relation, fact in read_facts(entry, codes).items()
        }
        asked = [entry.code for entry in entries if entry.code not in NOT_ASKED]
        chains = [c for hops in HOPS for c in balanced(list(all_chains(asked, facts, hops)), seed)]
        return cls(renamed, seed, entries, names, titles, facts, tuple(chains))

    @cached_property
    def pages(self) -> Sequence[Page]:
        """One for each section of each entry."""
        return tuple(section_pages(self.entries, self.names, by_name(self.names)))

    @cached_property
    def index(self) -> Sequence[Page]:
        """The root page and one for each region: only for agents without a search."""
        return tuple(index_pages(self.entries, self.names, self.regions))

    @cached_property
    def questions(self) -> Sequence[Question]:
        """One for each chain, in their order."""
        return make_questions(self.chains, self.names)

    @cached_property
    def page_of(self) -> Mapping[str, Page]:
        """url -> page, those of the index included."""
        return {page.url: page for page in (*self.pages, *self.index)}

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that pages and questions decide."""
        whole = hashlib.sha256()
        for page in (*self.pages, *self.index):
            links = [(link.text, link.url) for link in page.links]
            outline = [(heading.text, heading.level, heading.start) for heading in page.outline]
            whole.update(repr((page.url, page.title, page.text, links, outline)).encode())
        for question in self.questions:
            whole.update(repr((question.id, question.text, question.answers, question.info)).encode())
        return whole.hexdigest()[:16]
