"""The factbook in a closed vocabulary: documents of fields with one-word values, and the chains that lead through them.

    Fiji Geography area 18e3 highest_point Tomanivi coastline 11e2 Land_use/forest 6e1 ...
    Fiji Economy top_export UnitedStates export_2 Australia export_3 NewZealand currency Fijiandollars ...

1. Names are folded to letters and digits, numbers rounded: to two digits where they are facts, to one elsewhere. An
   answer is one word, and two entries whose areas are alike have the same one. No word holds the stop word, which a
   tokenizer would cut out of it: `.fj` is `fj_`.
2. A fact that a text states by a comparison (the longest border of a list) is a field of its own here: a policy of two
   layers copies, it does not calculate. What the list has beside it are fields of their own too, up to three.
3. Other fields are the texts of the same section that begin with a number and that most entries have.

facts = "permuted" deals the values of each relation anew among the entries that have one; chains are those of the world
that results.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from mgrpo.environments.task import Question, Split
from mgrpo.tasks.factbook.chains import HOPS, all_chains, balanced, split_of
from mgrpo.tasks.factbook.data import Entry
from mgrpo.tasks.factbook.facts import (
    EXPORTS,
    IMPORTS,
    LEAVES,
    PLACES,
    RELATIONS,
    Fact,
    Facts,
    borders,
    partners,
)
from mgrpo.tasks.factbook.names import by_name
from mgrpo.tasks.factbook.world import NOT_ASKED, World
from mgrpo.tasks.words.documents import Document, stable_hash
from mgrpo.tasks.words.protocol import Language
from mgrpo.tasks.words.questions import MAX_HOPS, Pools, in_words
from mgrpo.tasks.words.world import FactsMode, fold
from mgrpo.tasks.words.world import World as WordsWorld

SECTIONS: Mapping[str, str] = {
    "Geography": "Geography",
    "People and Society": "People",
    "Government": "Government",
    "Economy": "Economy",
    "Energy": "Energy",
    "Communications": "Communications",
}
"""The package's name of a section -> its word. Nothing is asked of Energy."""
MAX_NUMBERS = 30
"""Fields of a section beside those of facts and lists, at most."""
MIN_ENTRIES = 100
"""Entries that have such a field, at least."""
LISTED = (2, 3, 4)
"""Places of a list that are fields of their own: border_2, export_2, import_2 ..."""
RESULTS = 4

_NUMBER = re.compile(r"\$?(-?[\d,]*\.?\d+)%?(?: (thousand|million|billion|trillion))?(?![\d.,])")
_SCALES = {None: 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_NUMERIC = ("area", "population", "coastline", "median_age", "literacy")
_SEED = 1


def number(text: str, digits: int = 1) -> str:
    """The word of the number that a text begins with, digits and a power of ten; "" where it begins with none."""
    match = _NUMBER.match(text)
    if match is None:
        return ""
    value = float(match[1].replace(",", "")) * _SCALES[match[2]]
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.replace('.', '')}e{int(exponent) - digits + 1}"


class View(WordsWorld):
    """facts: (relation, word of an entry) -> word. documents: title -> document, two words a title."""

    def __init__(self, facts: FactsMode = "real") -> None:
        self.altered = facts == "permuted"
        world = _world()
        self._asked = [entry for entry in world.entries if entry.code not in NOT_ASKED]
        self._words = {code: fold(name.name) for code, name in world.names.items()}
        self._codes = by_name(world.names)
        typed = _dealt(world.facts) if self.altered else world.facts
        codes = [entry.code for entry in self._asked]
        self._chains = (
            [c for hops in HOPS for c in balanced(list(all_chains(codes, typed, hops)), world.seed)]
            if self.altered
            else world.chains
        )
        self.facts = self._in_words(typed)
        self._real = self._in_words(world.facts)
        self.documents = {d.title: d for entry in self._asked for d in self._documents(entry, typed)}

    @property
    def names(self) -> frozenset[str]:
        """The words of all entries that have documents."""
        return frozenset(self._words[entry.code] for entry in self._asked)

    def pools(self, split: Split) -> Pools:
        """The questions of a split, item h - 1 those with h relations; none have one. A chain whose answer already
        appears in it is dropped; so is one that a permuted world and the real one answer alike."""
        real = WordsWorld(self._real)
        pools: Pools = tuple([] for _ in range(MAX_HOPS))
        for chain in self._chains:
            start, plan = self._words[chain.start], tuple(fact.relation for fact in chain.facts)
            values = self.follow(start, plan)
            if split_of(chain.start) != split or values is None or values[-1] in (start, *values[:-1]):
                continue
            truth = real.follow(start, plan)
            if self.altered and truth is not None and truth[-1] == values[-1]:
                continue
            info = {"hops": chain.hops, "start": start, "real_answer": truth[-1] if truth else None}
            pools[chain.hops - 1].append(Question(in_words(start, plan), values[-1], info, chain.id))
        return pools

    def _in_words(self, typed: Facts) -> dict[tuple[str, str], str]:
        return {
            (relation, self._words[code]): self._value(fact)
            for (code, relation), fact in typed.items()
            if fact.section in SECTIONS
        }

    def _value(self, fact: Fact) -> str:
        if fact.target:
            return self._words[fact.target]
        if fact.relation in _NUMERIC:
            return number(fact.value, 2)
        return f"{fact.value[1:]}_" if fact.relation == "internet_code" else fold(fact.value)

    def _documents(self, entry: Entry, typed: Facts) -> Iterator[Document]:
        """Of one entry: fields in an order that a hash decides."""
        name = self._words[entry.code]
        for section, word in SECTIONS.items():
            fields = [
                (relation, self._value(fact))
                for relation in (*RELATIONS, *LEAVES)
                if (fact := typed.get((entry.code, relation))) is not None and fact.section == section
            ]
            fields += self._listed(entry, section, {value for _, value in fields})
            for path, field in _number_fields()[section].items():
                if value := number(entry.text(section, *path)):
                    fields.append((field, value))
            if fields:
                fields.sort(key=lambda field: stable_hash(f"{name} {field[0]}"))
                yield Document(f"{name} {word}", tuple(fields))

    def _listed(self, entry: Entry, section: str, told: set[str]) -> Iterator[tuple[str, str]]:
        """What the lists of borders and partners have beside the facts."""
        lists: dict[str, list[tuple[str, float]]] = {}
        if section == "Geography":
            lists["border"] = borders(entry)
        if section == EXPORTS[0]:
            lists |= {"export": partners(entry, EXPORTS), "import": partners(entry, IMPORTS)}
        for kind, pairs in lists.items():
            ranked = sorted(pairs, key=lambda pair: -pair[1])
            others = [self._words[self._codes[name]] for name, _ in ranked if name in self._codes]
            others = [word for word in others if word not in told]
            yield from ((f"{kind}_{place}", word) for place, word in zip(LISTED, others, strict=False))


@functools.cache
def view_of(facts: FactsMode) -> View:
    """The view, made once a process."""
    return View(facts)


@functools.cache
def language() -> Language:
    """The words of the view: the same for real and permuted facts."""
    view = view_of("real")
    relations = (*RELATIONS, *LEAVES)
    told = {field for d in view.documents.values() for field, _ in d.fields}
    values = {value for d in view.documents.values() for _, value in d.fields}
    sections = {fact.relation: fact.section for fact in _world().facts.values()}
    return Language(
        relations,
        tuple(sorted(view.names | values)),
        fields=tuple(sorted(told - set(relations))),
        sections=tuple(SECTIONS.values()),
        homes=tuple(SECTIONS[sections[relation]] for relation in relations),
        results=RESULTS,
        max_opens=1,
    )


@functools.cache
def _world() -> World:
    return World.build()


@functools.cache
def _number_fields() -> Mapping[str, Mapping[tuple[str, ...], str]]:
    """Section -> path of a field that begins with a number -> its word; the most frequent ones."""
    facts = {(section, tuple(path)) for section, *path in PLACES.values()}
    found: dict[str, Mapping[tuple[str, ...], str]] = {}
    for section in SECTIONS:
        count = Counter(
            row.path
            for entry in _world().entries
            for row in entry.sections.get(section, ())
            if (section, row.path) not in facts and number(row.text)
        )
        paths = [
            path
            for path, n in sorted(count.items(), key=lambda item: (-item[1], item[0]))
            if n >= MIN_ENTRIES
        ]
        found[section] = {
            path: "/".join(path).replace(" ", "_").replace(".", "") for path in paths[:MAX_NUMBERS]
        }
    return found


def _dealt(facts: Facts) -> Facts:
    """The values of each relation, dealt anew among the entries that have one; nobody is dealt to itself."""
    rng = np.random.default_rng(_SEED)
    dealt: dict[tuple[str, str], Fact] = {}
    for relation in (*RELATIONS, *LEAVES):
        codes = sorted(code for code, name in facts if name == relation)
        for code, i in zip(codes, rng.permutation(len(codes)), strict=True):
            fact = facts[codes[i], relation]
            if fact.target != code:
                dealt[code, relation] = fact
    return dealt
