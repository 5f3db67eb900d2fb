"""Pages: one for each section of each entry, its text from the data, its links ours.

    https://factbook.example/austria/geography
    Austria: Geography

    Land boundaries
    total: 2,524 km
    border countries: Czech Republic 402 km; Germany 801 km; ...

    Coastline: 0 km (landlocked)

A page links to the entries that its borders, its trade partners and its independence name (their first page,
Introduction), then to the other sections of its own entry. In the mode "links" there is no search; a root page and one
for each region lead to the first pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mgrpo.tasks.factbook.data import Entry, Row
from mgrpo.tasks.factbook.facts import (
    BORDERS,
    EXPORTS,
    IMPORTS,
    INDEPENDENCE,
    borders,
    independent_from,
    partners,
)
from mgrpo.tasks.factbook.names import Names
from mgrpo.tools.page import Heading, Link, Page

ROOT = "https://factbook.example"
HOME = "Introduction"
"""The section that is an entry's first page: all of them have it."""


def page_url(names: Names, code: str, section: str = HOME) -> str:
    """Address of a section's page. No address holds an entry's code, which would survive a renaming."""
    return f"{ROOT}/{names[code].slug}/{section.lower().replace(' ', '-')}"


def section_pages(entries: Sequence[Entry], names: Names, codes: Mapping[str, str]) -> Iterator[Page]:
    """All section pages, entry by entry in the order of their codes. codes: name or alias -> code."""
    for entry in entries:
        for section, rows in entry.sections.items():
            links = [Link(name, page_url(names, code)) for name, code in _named(entry, section, codes)]
            links += [
                Link(f"{names[entry.code].name}: {other}", page_url(names, entry.code, other))
                for other in entry.sections
                if other != section
            ]
            text, outline = section_text(rows)
            title = f"{names[entry.code].name}: {section}"
            yield Page(page_url(names, entry.code, section), title, text, tuple(links), outline)


def section_text(rows: Sequence[Row]) -> tuple[str, tuple[Heading, ...]]:
    """A paragraph for each field, a line for each of its texts; and where each field begins."""
    paragraphs: dict[str, list[str]] = {}
    for row in rows:
        field, *parts = row.path
        if not parts:
            paragraphs.setdefault(field, []).insert(0, f"{field}: {row.text}")
            continue
        lines = paragraphs.setdefault(field, [field])
        part = " - ".join(parts)
        lines.append(row.text if part == "note" else f"{part}: {row.text}")
    text, outline = "", []
    for field, lines in paragraphs.items():
        text += "\n\n" if text else ""
        outline.append(Heading(field, 1, len(text)))
        text += "\n".join(lines)
    return text, tuple(outline)


def region_title(region: str) -> str:
    """The package's name of a region in words: "east-n-southeast-asia" -> East and Southeast Asia."""
    return " ".join("and" if word == "n" else word.capitalize() for word in region.split("-"))


def index_pages(entries: Sequence[Entry], names: Names, titles: Mapping[str, str]) -> Iterator[Page]:
    """The root page and one for each region, for agents that have no search. titles: region -> its name in words."""
    regions: dict[str, list[str]] = {}
    for entry in entries:
        regions.setdefault(entry.region, []).append(entry.code)
    urls = {region: f"{ROOT}/regions/{title.lower().replace(' ', '-')}" for region, title in titles.items()}
    links = tuple(Link(titles[region], urls[region]) for region in sorted(regions))
    yield Page(f"{ROOT}/", "The factbook: regions", _list(links), links)
    for region in sorted(regions):
        by_name = sorted(regions[region], key=lambda code: names[code].name)
        links = tuple(Link(names[code].name, page_url(names, code)) for code in by_name)
        yield Page(urls[region], f"The factbook: {titles[region]}", _list(links), links)


def _named(entry: Entry, section: str, codes: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name as written, code) of the entries that the typed fields of a section name, each once."""
    written: list[str] = []
    if section == BORDERS[0]:
        written += [name for name, _ in borders(entry)]
    if section == EXPORTS[0]:
        written += [name for place in (EXPORTS, IMPORTS) for name, _ in partners(entry, place)]
    if section == INDEPENDENCE[0] and (name := independent_from(entry)):
        written.append(name)
    found: dict[str, str] = {}
    for name in written:
        if (code := codes.get(name)) and code != entry.code:
            found.setdefault(code, name)
    return [(name, code) for code, name in found.items()]


def _list(links: Sequence[Link]) -> str:
    return "\n".join(link.text for link in links)
