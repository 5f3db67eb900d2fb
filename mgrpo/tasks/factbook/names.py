"""What entries are called: one name each, and every other name by which the texts of other entries know them.

The name is the conventional short form, or the long form where there is no short one. For eleven entries the package
has no name, several, or one with an explanation in it: OVERRIDES. Borders and trade partners are written in other ways
for 24 entries ("USA", "S. Korea", "Czech Republic" beside "Czechia"): ALIASES. A name that neither table knows ("French
Guiana") belongs to no entry, and no question leads through it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mgrpo.tasks.factbook.data import Entry

OVERRIDES: Mapping[str, str] = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "fk": "Falkland Islands",
    "gz": "Gaza Strip",
    "iv": "Cote d'Ivoire",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "vt": "Holy See",
    "xx": "World",
}
ALIASES: Mapping[str, tuple[str, ...]] = {
    "ac": ("Antigua & Barbuda",),
    "ae": ("UAE",),
    "bf": ("Bahamas, The", "Bahamas"),
    "bk": ("Bosnia & Herzegovina",),
    "cf": ("Congo (Brazzaville)", "Congo, Republic of the"),
    "cg": ("DRC", "Congo, Democratic Republic of the"),
    "cv": ("Cape Verde",),
    "ez": ("Czech Republic",),
    "fm": ("Micronesia",),
    "ga": ("Gambia, The", "Gambia"),
    "iv": ("Côte d'Ivoire", "Ivory Coast"),
    "ks": ("S. Korea",),
    "kn": ("N. Korea",),
    "mk": ("Macedonia",),
    "nz": ("NZ",),
    "sc": ("St. Kitts & Nevis", "St. Kitts and Nevis"),
    "st": ("St. Lucia",),
    "td": ("Trinidad & Tobago",),
    "tt": ("East Timor",),
    "tu": ("Turkiye",),
    "uk": ("UK", "Great Britain"),
    "us": ("USA", "US", "United States of America"),
    "vc": ("St. Vincent & the Grenadines", "St. Vincent and the Grenadines"),
    "wz": ("Swaziland",),
}
ARTICLE = (
    *("bf", "cf", "cg", "ck", "cj", "cq", "cr", "ct", "cw", "dr", "ee", "fk", "fm", "fo", "fs", "ga", "gz"),
    *("io", "mv", "nl", "pc", "pf", "pg", "rm", "rp", "tk", "ae", "uk", "um", "us", "vi", "vq", "vt"),
    *("bp", "im", "we", "xx", "cn"),
)
"""Entries whose names take "the" within a sentence."""


@dataclass(frozen=True, slots=True)
class Name:
    """What one entry is called."""

    name: str
    aliases: tuple[str, ...] = ()
    article: bool = False

    @property
    def spoken(self) -> str:
        """Within a sentence."""
        if not self.article:
            return self.name
        return f"the {self.name.removeprefix('The ')}"

    @property
    def all(self) -> tuple[str, ...]:
        return self.name, *self.aliases

    @property
    def slug(self) -> str:
        """Within an address: "Cote d'Ivoire" -> cote-d-ivoire."""
        folded = unicodedata.normalize("NFKD", self.name).encode("ascii", "ignore").decode().lower()
        return "-".join("".join(c if c.isalnum() else " " for c in folded).split())


Names = Mapping[str, Name]
"""Code of an entry -> what it is called."""


def entry_names(entries: Iterable[Entry]) -> Names:
    """The names of all entries. Raises AssertionError where two entries share a name or an address."""
    found = {entry.code: _name(entry) for entry in entries}
    assert len({name.slug for name in found.values()}) == len(found), "two entries share an address"
    by_name(found)
    return found


def _name(entry: Entry) -> Name:
    short, long = (
        entry.text("Government", "Country name", f"conventional {form} form") for form in ("short", "long")
    )
    name = OVERRIDES.get(entry.code) or (long if short in ("", "none") else short)
    return Name(name, ALIASES.get(entry.code, ()), entry.code in ARTICLE)


def by_name(names: Names) -> dict[str, str]:
    """Every name and alias -> code of its entry."""
    found: dict[str, str] = {}
    for code, name in names.items():
        for spelling in name.all:
            assert found.setdefault(spelling, code) == code, f"{spelling} names {found[spelling]} and {code}"
    return found
