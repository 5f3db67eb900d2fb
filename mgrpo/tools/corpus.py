"""Pages of a corpus: the shape only, until the corpus itself is here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """A link on a page."""

    text: str
    url: str


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a corpus."""

    url: str
    title: str
    text: str
    links: tuple[Link, ...] = ()
    outline: tuple[str, ...] = ()
