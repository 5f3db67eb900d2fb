"""The same world under invented names: a bijection over every text of the corpus.

A language model knows that Vienna is the capital of Austria without looking. In the renamed world entries have invented
names, so that no question can be answered, and none be shortened, by what was learned from the real ones.

Replaced, as whole words, wherever they stand (texts, titles, addresses, questions, answers):

    names      conventional and local short names, and the spellings of names.ALIASES ("USA", "S. Korea")
    people     nouns and adjectives of nationality, singular and plural ("Austrian", "Dane", "Danish", "Frenchwomen")
    stems      what is left of a name outside of it ("Korea", "Congo", "America", "Britain")
    codes      internet country codes (".at")

each by a word of its own that the corpus does not have; capitals stay capitals ("MEXICO CITY"). Addresses of web sites
and mail, which are written around names, become "[address]". So the way back is unique.

What stays: cities, persons, rivers, languages without a people's name, events. A model that reads a page may recognise
the country; it cannot name the right page, or its answer, without having read.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mgrpo.tasks.factbook.data import Entry, Row
from mgrpo.tasks.factbook.names import Name, Names

KEPT = ("ee", "xx")
"""The European Union and the world keep their names: no question is about them."""
STEMS: Mapping[str, tuple[str, ...]] = {
    "ae": ("Emirates",),
    "bm": ("Myanmar",),
    "cf": ("Congo",),
    "gr": ("Hellenic",),
    "ks": ("Korea",),
    "nl": ("Holland",),
    "sv": ("Spitsbergen",),
    "uk": ("Britain", "England", "English"),
    "us": ("America", "U.S."),
    "vt": ("Vatican City", "Vatican"),
}
COMMON = frozenset({"Island", "NA", "None", "US", "Islander", "Islanders"})
"""Words of the fields that are read for names, which are no names (Iceland calls itself Island)."""
NAME_ENDS = ("", "or", "um", "ax", "eb", "un", "os", "id", "ul", "ap", "ir", "esh", "ug")
PEOPLE_ENDS = ("ian", "er", "ite", "ard", "ene", "ik", "ol", "int", "usk", "elf", "omb", "arn")
ADDRESS = re.compile(r"\S*(?:@|https?://|www\.|\.gov\b|\.com\b|\.org\b)\S*")
CODE = re.compile(r"(?<![\w.])\.[a-z]{2}(?!\w)")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Renamed:
    """text: any text of the world under the invented names."""

    entries: tuple[Entry, ...]
    names: Names
    text: Callable[[str], str]


def rename(entries: Sequence[Entry], names: Names, seed: int) -> Renamed:
    """The renamed world. seed: draws the invented names."""
    table = rename_table(entries, names, seed)
    codes = code_table(entries, seed)
    change = substitution(table)

    def text(old: str) -> str:
        return CODE.sub(lambda match: codes.get(match[0], match[0]), change(masked(old)))

    changed = tuple(
        replace(
            entry,
            sections={
                title: tuple(Row(tuple(map(text, row.path)), text(row.text)) for row in rows)
                for title, rows in entry.sections.items()
            },
        )
        for entry in entries
    )
    return Renamed(changed, {code: _name(code, name, table) for code, name in names.items()}, text)


def masked(text: str) -> str:
    """Without the addresses of web sites and mail."""
    return ADDRESS.sub("[address]", text)


def _name(code: str, name: Name, table: Mapping[str, str]) -> Name:
    if code in KEPT:
        return name
    return Name(table[name.name], tuple(table[alias] for alias in name.aliases))


def rename_table(entries: Sequence[Entry], names: Names, seed: int) -> dict[str, str]:
    """Old name -> invented one, both unique; every old name in capitals too."""
    taken = sorted({word.casefold() for word in _words(entries)})
    owners = _owners(entries, names)
    table: dict[str, str] = {}
    for entry in entries:
        mine = [term for term, (code, _) in owners.items() if code == entry.code]
        if not mine:
            continue
        called = [term for term in mine if owners[term][1] == "name"]
        people = [term for term in mine if owners[term][1] == "people"]
        root = _root(f"{seed}/{entry.code}", taken)
        for kind, ends in ((called, NAME_ENDS), (people, PEOPLE_ENDS)):
            _invent(kind, root, ends, table, seed, taken)
    return table | {
        old.upper(): new.upper() for old, new in table.items() if len(old) > 3 and old.upper() not in table
    }


def _invent(
    terms: Sequence[str], root: str, ends: Sequence[str], table: dict[str, str], seed: int, taken: list[str]
) -> None:
    """Give each term its word: abbreviations one of as many letters, plurals that of their singular with an s."""
    left = iter(ends)
    for term in terms:
        if term.isupper() and term.isalpha():
            table[term] = _letters(f"{seed}/{term}", len(term), taken)
        elif term.endswith("s") and term[:-1] in table:
            table[term] = table[term[:-1]] + "s"
        else:
            table[term] = root + next(left)


def _owners(entries: Sequence[Entry], names: Names) -> dict[str, tuple[str, str]]:
    """Term -> (entry whose root it gets, "name" or "people"). A word of several ("Korean", "French") is of the one
    whose name it resembles most, then of the one that has it first."""
    claims: dict[str, list[tuple[int, int, str, str]]] = {}
    for entry in entries:
        if entry.code in KEPT:
            continue
        name = names[entry.code].name
        for kind, terms in (("name", _called(entry, names)), ("people", _people(entry))):
            for place, term in enumerate(terms):
                rank = (0 if kind == "name" else 1) * 100 - _alike(term, name), place
                claims.setdefault(term, []).append((*rank, entry.code, kind))
    return {term: (best[2], best[3]) for term, best in ((t, min(c)) for t, c in claims.items())}


def _alike(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _called(entry: Entry, names: Names) -> list[str]:
    """Everything that is a name of the entry, as it is and without accents."""
    local = entry.text("Government", "Country name", "local short form")
    short = entry.text("Government", "Country name", "conventional short form")
    found = [
        part.strip()
        for text in (short, local)
        for part in re.split(r"[/,;]| or ", re.sub(r"\([^)]*\)", "", text))
    ]
    return list(dict.fromkeys((*names[entry.code].all, *STEMS.get(entry.code, ()), *_terms(found))))


def _people(entry: Entry) -> list[str]:
    """Nouns and adjectives of nationality, singular before plural."""
    found: list[str] = []
    for form in ("adjective", "noun"):
        text = entry.text("People and Society", "Nationality", form)
        for part in re.split(r"[/,;]| or |note - ", text):
            match = re.fullmatch(r"\s*(?:former term )?([^()]+?)\s?(?:\((s|men|women)\))?\s*(?:\(.*)?", part)
            if not match:
                continue
            one, plural = match[1], match[2]
            found.append(one)
            if plural == "s":
                found.append(one + "s")
            elif plural:
                found.append(one[: -len("man")] + "men")
    return _terms(found)


def _terms(found: Sequence[str]) -> list[str]:
    """Those that are names, each once, and their forms without accents. An apostrophe at the end is not theirs, since
    one may follow them anywhere."""
    found = [term.strip().rstrip("'") for term in found]
    named = [term for term in found if len(term) > 1 and term not in COMMON and re.search(r"[A-Z]", term)]
    named = [term for term in named if not re.search(r"[()\[\]]", term)]
    return list(dict.fromkeys(form for term in named for form in (term, fold(term))))


def fold(text: str) -> str:
    """Without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def code_table(entries: Sequence[Entry], seed: int) -> dict[str, str]:
    """Old internet code -> an invented one, both unique and none of the old."""
    old = sorted({m for entry in entries for row in _rows(entry) for m in CODE.findall(row.text)})
    letters = "abcdefghijklmnopqrstuvwxyz"
    free = [f".{a}{b}" for a in letters for b in letters if f".{a}{b}" not in old]
    free.sort(key=lambda code: _draw(f"{seed}/{code}"))
    return dict(zip(old, free, strict=False))


def substitution(table: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces the longest term of the table at each place, as whole words only."""
    by_first: dict[str, list[tuple[str, str]]] = {}
    for old in sorted(table, key=len, reverse=True):
        match = _WORD.match(old)
        assert match, f"{old!r} begins with no letter"
        by_first.setdefault(match[0], []).append((old, table[old]))

    def change(text: str) -> str:
        parts, at = [], 0
        for word in _WORD.finditer(text):
            start = word.start()
            if start < at:
                continue
            for old, new in by_first.get(word[0], ()):
                end = start + len(old)
                if text.startswith(old, start) and not (old[-1].isalpha() and text[end : end + 1].isalpha()):
                    parts += [text[at:start], new]
                    at = end
                    break
        return "".join((*parts, text[at:])) if parts else text

    return change


def _rows(entry: Entry) -> Iterator[Row]:
    for rows in entry.sections.values():
        yield from rows


def _words(entries: Sequence[Entry]) -> set[str]:
    return {word for entry in entries for row in _rows(entry) for word in _WORD.findall(row.text)}


def _draw(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")


def _root(key: str, taken: list[str]) -> str:
    """An invented word to put endings on; no word of the corpus begins with it. `taken` (sorted) grows by it."""
    for attempt in range(1000):
        n = _draw(f"{key}/{attempt}")
        parts = []
        for starts in ("bdfgjklmnprstvz", "bdgklmnprstvz", "dgklmnrtvz"):
            n, first = divmod(n, len(starts))
            n, vowel = divmod(n, 5)
            parts.append(starts[first] + "aeiou"[vowel])
        root = "".join(parts) + "nrlkm"[n % 5]
        place = bisect_left(taken, root)
        if not taken[place : place + 1] or not taken[place].startswith(root):
            taken.insert(place, root)
            return root.capitalize()
    raise AssertionError("a thousand invented names are taken")


def _letters(key: str, length: int, taken: list[str]) -> str:
    """An invented abbreviation. `taken` (sorted) grows by it."""
    for attempt in range(1000):
        n = _draw(f"{key}/{attempt}")
        letters = "".join("BCDFGHJKLMNPQRSTVWXZ"[n // 20**i % 20] for i in range(length))
        place = bisect_left(taken, letters.casefold())
        if taken[place : place + 1] != [letters.casefold()]:
            taken.insert(place, letters.casefold())
            return letters
    raise AssertionError("a thousand invented abbreviations are taken")
