"""The world of the task: 181 countries from the package countryinfo, their facts and their fixed splits.

A country is kept when all of its facts are known, at least 100,000 people live there, and its name, capital
and demonym are unique among all names of the kept countries after folding to ASCII letters and digits. Every
name is one word, so that a policy with one token per name can copy it: `Burkina Faso` is `BurkinaFaso`, a
language is its code with an underscore (`en_`), a calling code keeps its plus (`+679`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgrpo.environments.task import Split
from mgrpo.tasks.words.world import FactsMode, fold
from mgrpo.tasks.words.world import World as WordsWorld

FIELDS = ("capital", "people", "currency", "language", "region", "phone", "neighbour")
"""Relations of a country; "country" is the relation of a city and of a people."""
RELATIONS = ("country", *FIELDS)

SPLIT_SIZES: Mapping[Split, int] = {"train": 109, "validation": 27, "heldout": 45}
MIN_POPULATION = 100_000
_SPLIT_SEED = 0
_PERMUTATION_SEED = 1


@dataclass(frozen=True, slots=True)
class Country:
    """One country's values by relation. Its neighbour depends on the split; borders are alpha-3 codes."""

    name: str
    code: str
    values: Mapping[str, str]
    borders: tuple[str, ...]


@functools.cache
def load_countries() -> tuple[Country, ...]:
    """The kept countries in alphabetical order."""
    from countryinfo import all_countries

    known = [c for c in (_read(country.info()) for country in all_countries()) if c is not None]
    count = Counter(name for c in known for name in _names(c))
    kept = [c for c in known if all(count[name] == 1 for name in _names(c))]
    return tuple(sorted(kept, key=lambda c: c.name))


def _names(country: Country) -> tuple[str, str, str]:
    return country.name, country.values["capital"], country.values["people"]


def _read(info: Mapping[str, Any]) -> Country | None:
    """One record of the package, or None when it lacks something the task needs."""

    def first(key: str) -> str:
        values = info.get(key) or [""]
        return str(values[0])

    capital = info.get("capital")
    values = {
        "capital": fold(capital) if isinstance(capital, str) else "",  # a few records hold a list of capitals
        "people": fold(info.get("demonym") or ""),
        "currency": first("currencies"),
        "language": first("languages") and f"{first('languages')}_",
        "region": fold(info.get("intermediateregion") or info.get("subregion") or ""),
        "phone": first("callingCodes") and f"+{first('callingCodes')}",
    }
    iso = info.get("ISO") or {}
    name, code = fold(info.get("name") or ""), iso.get("alpha3") or ""
    # Superseded records (Burma beside Myanmar) share the letters of the current one but have no numeric code.
    complete = name and code and iso.get("numeric") and all(values.values())
    if not complete or (info.get("population") or 0) < MIN_POPULATION:
        return None
    return Country(name, code, values, tuple(info.get("borders") or ()))


@functools.cache
def entities() -> tuple[str, ...]:
    """Every name and value of every split, sorted: the entity tokens of a policy's vocabulary."""
    countries = load_countries()
    return tuple(sorted({c.name for c in countries} | {v for c in countries for v in c.values.values()}))


@functools.cache
def split_countries(split: Split) -> tuple[Country, ...]:
    """The countries of one split, alphabetically. The splits are disjoint and never change."""
    countries = load_countries()
    if len(countries) != sum(SPLIT_SIZES.values()):
        raise ValueError(
            f"countryinfo gives {len(countries)} usable countries, expected {sum(SPLIT_SIZES.values())}; "
            "install countryinfo==1.0.1"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(countries))
    start = 0
    for name, size in SPLIT_SIZES.items():
        if name == split:
            return tuple(countries[i] for i in sorted(order[start : start + size]))
        start += size
    raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLIT_SIZES)}")


class World(WordsWorld):
    """The facts the documents tell: (relation, entity) -> value. Chains never leave a split.

    facts = "permuted" deals the values of each relation anew among the countries of a split: documents then
    tell of a world that does not exist, and a policy that had memorised the real one is found out.
    """

    def __init__(self, facts: FactsMode = "real") -> None:
        if facts not in ("real", "permuted"):
            raise ValueError(f"facts={facts!r}, expected 'real' or 'permuted'")
        self.altered = facts == "permuted"
        super().__init__({})
        self.countries: dict[Split, tuple[str, ...]] = {}
        rng = np.random.default_rng(_PERMUTATION_SEED) if facts == "permuted" else None
        for split in SPLIT_SIZES:
            members = split_countries(split)
            self.countries[split] = tuple(c.name for c in members)
            for relation in FIELDS:
                values = _neighbours(members) if relation == "neighbour" else _values(members, relation)
                self._add(relation, members, values, rng)

    def _add(
        self,
        relation: str,
        members: Sequence[Country],
        values: Sequence[str | None],
        rng: np.random.Generator | None,
    ) -> None:
        if rng is not None:
            values = [values[i] for i in rng.permutation(len(values))]
        for country, value in zip(members, values, strict=True):
            if value is None or value == country.name:  # only dealt neighbours can meet themselves
                continue
            self.facts[relation, country.name] = value
            if relation in ("capital", "people"):
                self.facts["country", value] = country.name


def _values(members: Sequence[Country], relation: str) -> list[str | None]:
    return [c.values[relation] for c in members]


def _neighbours(members: Sequence[Country]) -> list[str | None]:
    """Each member's alphabetically first bordering country of the same split, None where there is none."""
    by_code = {c.code: c.name for c in members}
    return [min((by_code[b] for b in c.borders if b in by_code), default=None) for c in members]
