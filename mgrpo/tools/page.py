"""A page, and how an agent reads it: in parts that fit its context.

A part names the page, where it stands among the parts, and what sections the page has; behind its text stand the links
that the text holds, each with its number on the page. Nothing of a page is lost: what has no room in a part stands in
the next.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OUTLINE = 30  # headings that a part lists
HEADING = 120  # characters of one
LINK = 300  # characters of a link's line beside its address


@dataclass(frozen=True, slots=True)
class Link:
    """A link on a page. url: absolute, or the address of a page of the same corpus."""

    text: str
    url: str


@dataclass(frozen=True, slots=True)
class Heading:
    """start: where the heading's line begins in the page's text, in characters. level: 1 is the highest."""

    text: str
    level: int
    start: int


@dataclass(frozen=True, slots=True)
class Page:
    """text: paragraphs divided by empty lines, headings as lines of their own. outline: the headings in order."""

    url: str
    title: str
    text: str
    links: tuple[Link, ...] = ()
    outline: tuple[Heading, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a page. number: from 1 on; of: how many there are."""

    text: str
    links: tuple[str, ...]
    number: int
    of: int


def parts(page: Page, size: int) -> list[Part]:
    """A page in parts of at most `size` characters of text and link lines each, without the head of a part. At least
    one, even of an empty page."""
    filled: list[tuple[list[str], list[tuple[str, str]]]] = []
    room = 0
    for line, link in _lines(page, size):
        if not filled or len(line) + 1 > room:
            filled.append(([], []))
            room = size
        room -= len(line) + 1
        if link is None:
            filled[-1][0].append(line)
        else:
            filled[-1][1].append((line, link))
    filled = [(text, links) for text, links in filled if links or any(line.strip() for line in text)] or [
        ([], [])
    ]
    return [
        Part(
            _head(page, number, len(filled)) + _body(text, links),
            tuple(url for _, url in links),
            number,
            len(filled),
        )
        for number, (text, links) in enumerate(filled, 1)
    ]


def excerpt(page: Page, spans: Sequence[tuple[int, int]]) -> Part:
    """Only these spans of a page's text, in order, with the links that they hold."""
    pieces = [page.text[start:end].strip() for start, end in spans]
    text = "\n\n[...]\n\n".join(pieces)
    links = [
        (f"[{n}] {_link(link)}", link.url)
        for n, link in enumerate(page.links, 1)
        if link.text.strip() and link.text in text
    ]
    head = _head(page, 1, 1).replace("\n\n", "\nOnly the passages nearest to the goal.\n\n", 1)
    return Part(head + _body(text.split("\n"), links), tuple(url for _, url in links), 1, 1)


def _head(page: Page, number: int, of: int) -> str:
    """Title, address, place among the parts and, on the first, the sections."""
    lines = [" ".join(page.title.split()), page.url]
    if of > 1:
        lines.append(f"Part {number} of {of}")
    if number == 1 and page.outline:
        names = [" ".join(heading.text.split())[:HEADING] for heading in page.outline[:OUTLINE]]
        more = len(page.outline) - len(names)
        lines.append(f"Sections: {'; '.join(names)}{f'; and {more} more' if more else ''}")
    return "\n".join(line for line in lines if line) + "\n\n"


def _body(text: Sequence[str], links: Sequence[tuple[str, str]]) -> str:
    body = "\n".join(text).strip("\n")
    if links:
        body += "\n\nLinks:\n" + "\n".join(line for line, _ in links)
    return body.strip("\n")


def _lines(page: Page, size: int) -> Iterator[tuple[str, str | None]]:
    """(line, None) of the text and (line, address) of each link behind the line in which its text first stands, looked
    for from the link before on; a link that stands nowhere comes last. No line is longer than `size` - 1."""
    lines = [piece for line in page.text.split("\n") for piece in _pieces(line, size - 1)]
    text, starts, at = "\n".join(lines), [], 0
    for line in lines:
        starts.append(at)
        at += len(line) + 1
    behind: dict[int, list[tuple[str, str]]] = {}
    at = 0
    for number, link in enumerate(page.links, 1):
        shown = f"[{number}] {_link(link)}"[: size - 1]
        wanted, place = link.text.strip(), len(lines) - 1
        found = text.find(wanted, at)
        if wanted and (found >= 0 or (found := text.find(wanted)) >= 0):
            at, place = found, bisect_right(starts, found) - 1
        behind.setdefault(place, []).append((shown, link.url))
    for number, line in enumerate(lines):
        yield line, None
        yield from behind.get(number, ())


def _link(link: Link) -> str:
    words = " ".join(link.text.split())[:LINK]
    return f"{words} - {link.url}" if words and words != link.url else link.url


def _pieces(line: str, size: int) -> Iterator[str]:
    """A line in pieces of at most `size` characters, cut at spaces where there are any."""
    while len(line) > size:
        cut = line.rfind(" ", 0, size + 1)
        cut = cut if cut > 0 else size
        yield line[:cut]
        line = line[cut:].lstrip(" ")
    yield line
