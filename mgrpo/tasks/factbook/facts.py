"""Typed facts: what a text says of its entry, where it says so in a form that has one reading.

A relation leads to another entry, a leaf ends in a value. A text with several readings (two capitals, partners with the
same share, a border list that names what is no entry at its end) gives no fact: no question is asked of it.

    relation           section      rule
    longest_border     Geography    of at least two borders the one with the most km, no other as long
    shortest_border    Geography    likewise the fewest
    top_export         Economy      the partner with the largest share, no other as large
    top_import         Economy      likewise
    independent_from   Government   the first date's "(from ...)", where it is nothing but an entry's name
    capital            Government   one name, without a note
    highest_point      Geography    a name and its metres
    ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mgrpo.tasks.factbook.data import Entry

RELATIONS = ("longest_border", "shortest_border", "top_export", "top_import", "independent_from")
LEAVES = (
    *("capital", "highest_point", "area", "population", "internet_code", "independence_date", "currency"),
    *("anthem", "coastline", "median_age", "literacy"),
)


@dataclass(frozen=True, slots=True)
class Fact:
    """What one entry's page says."""

    relation: str
    section: str
    value: str
    """As it stands on the page."""
    target: str = ""
    """Code of the entry that a relation leads to."""
    answers: tuple[str, ...] = ()
    """Of a leaf: every answer that is right, the canonical one first."""


Facts = Mapping[tuple[str, str], Fact]
"""(code of the entry, relation or leaf) -> fact."""

BORDERS = ("Geography", "Land boundaries", "border countries")
EXPORTS = ("Economy", "Exports - partners")
IMPORTS = ("Economy", "Imports - partners")
INDEPENDENCE = ("Government", "Independence")


def read_facts(entry: Entry, codes: Mapping[str, str]) -> dict[str, Fact]:
    """All facts of one entry by relation or leaf. codes: name or alias -> code."""
    found: list[Fact | None] = [
        _border(entry, codes, "longest_border", max),
        _border(entry, codes, "shortest_border", min),
        _partner(entry, codes, "top_export", EXPORTS),
        _partner(entry, codes, "top_import", IMPORTS),
        _one([independent_from(entry)], codes, "independent_from", INDEPENDENCE[0]),
    ]
    for leaf, (section, *path) in PLACES.items():
        text = entry.text(section, *path)
        if text and (answers := READERS[leaf](text)):
            found.append(Fact(leaf, section, answers[0], answers=tuple(dict.fromkeys(answers))))
    return {fact.relation: fact for fact in found if fact is not None}


def borders(entry: Entry) -> list[tuple[str, float]]:
    """Neighbour as written -> km; empty where a part of the list has another form."""
    parts = [p.strip() for p in re.split(r";|(?<=km),", entry.text(*BORDERS)) if p.strip()]
    read = [re.fullmatch(r"([^\d;]+?) ([\d,.]+) km(?: \([^)]*\))?", part) for part in parts]
    return [(m[1], float(m[2].replace(",", ""))) for m in read if m] if all(read) else []


def partners(entry: Entry, place: tuple[str, ...]) -> list[tuple[str, float]]:
    """Partner as written -> percent; empty where a part of the list has another form."""
    text = re.sub(r"\s*\(\d{4}(?: est\.)?\)$", "", entry.text(*place))
    parts = [p.strip() for p in re.split(r"(?<=%),", text) if p.strip()]
    read = [re.fullmatch(r"(.+?) ([\d.]+)%", part) for part in parts]
    return [(m[1], float(m[2])) for m in read if m] if all(read) else []


def independent_from(entry: Entry) -> str:
    """From whom, as written, by the text's first date; "" where it has another form."""
    match = re.match(r"\d{1,2} [A-Z][a-z]+ \d{4} \(from (?:the )?([^()]+)\)", entry.text(*INDEPENDENCE))
    return match[1] if match else ""


def _border(entry: Entry, codes: Mapping[str, str], relation: str, pick: Callable[..., float]) -> Fact | None:
    found = borders(entry)
    if len(found) < 2:
        return None
    end = pick(km for _, km in found)
    return _one([name for name, km in found if km == end], codes, relation, BORDERS[0])


def _partner(entry: Entry, codes: Mapping[str, str], relation: str, place: tuple[str, ...]) -> Fact | None:
    found = partners(entry, place)
    if not found:
        return None
    end = max(share for _, share in found)
    return _one([name for name, share in found if share == end], codes, relation, place[0])


def _one(names: list[str], codes: Mapping[str, str], relation: str, section: str) -> Fact | None:
    if len(names) != 1 or names[0] not in codes:
        return None
    return Fact(relation, section, names[0], codes[names[0]])


# -- leaves: text -> right answers, the one that stands on the page first; none where the text has several readings --


def _capital(text: str) -> list[str]:
    match = re.fullmatch(r"([^(),;:\d]+?)(?: \(([A-Z][^(),;:\d]*)\))?", text)
    return [name for name in match.groups() if name] if match else []


def _highest_point(text: str) -> list[str]:
    match = re.fullmatch(r"([^(),;:\d]+?)(?: \(([^()]+)\))? [\d,]+(?: m)?", text)
    if not match or match[1].startswith("unnamed"):
        return []
    other = [match[2]] if match[2] and re.fullmatch(r"[A-Z][^,;:\d]*", match[2]) else []
    return [match[1], *(match[1].split("/") if "/" in match[1] else ()), *other]


def _number(pattern: str, least: float) -> Callable[[str], list[str]]:
    """Of texts that match as a whole: the number in group 1, and without its commas."""

    def read(text: str) -> list[str]:
        match = re.fullmatch(pattern, text)
        if not match or float(match[1].replace(",", "")) < least:
            return []
        return [match[1], match[1].replace(",", "")]

    return read


def _internet_code(text: str) -> list[str]:
    return [text] if re.fullmatch(r"\.[a-z]{2}", text) else []


def _independence_date(text: str) -> list[str]:
    match = re.match(r"(\d{1,2} [A-Z][a-z]+ \d{4}) \(from [^()]+\)", text)
    return [match[1]] if match else []


def _currency(text: str) -> list[str]:
    match = re.fullmatch(r"([A-Za-z' ]+) \(([A-Z]{3})\) per [A-Z]{2} dollar -?", text)
    return [match[1], match[1].removesuffix("s"), match[2]] if match and " or " not in match[1] else []


def _anthem(text: str) -> list[str]:
    match = re.fullmatch(r'["“]([^"“”]+)["”](?: ?\(([^()]+)\))?', text)
    return [name for name in match.groups() if name] if match else []


READERS: Mapping[str, Callable[[str], list[str]]] = {
    "capital": _capital,
    "highest_point": _highest_point,
    "area": _number(r"([\d,]+) sq km", 10),
    "population": _number(r"([\d,]+) \(20\d\d(?: est\.)?\)", 100),
    "internet_code": _internet_code,
    "independence_date": _independence_date,
    "currency": _currency,
    "anthem": _anthem,
    "coastline": _number(r"([\d,.]+) km(?: \([^()]*\))?", 1),
    "median_age": _number(r"([\d.]+) years \(20\d\d est\.\)", 1),
    "literacy": _number(r"([\d.]+)% \(20\d\d est\.\)", 1),
}
PLACES: Mapping[str, tuple[str, ...]] = {
    "capital": ("Government", "Capital", "name"),
    "highest_point": ("Geography", "Elevation", "highest point"),
    "area": ("Geography", "Area", "total"),
    "population": ("People and Society", "Population", "total"),
    "internet_code": ("Communications", "Internet country code"),
    "independence_date": INDEPENDENCE,
    "currency": ("Economy", "Exchange rates", "Currency"),
    "anthem": ("Government", "National anthem(s)", "title"),
    "coastline": ("Geography", "Coastline"),
    "median_age": ("People and Society", "Median age", "total"),
    "literacy": ("People and Society", "Literacy", "total population"),
}
assert set(READERS) == set(PLACES) == set(LEAVES)
