"""Pages in one SQLite file, searched with its own full-text index (FTS5, bm25): a web that stands still.

A page is indexed by passages: its sections, cut at paragraphs to about PASSAGE characters. A search ranks passages and
gives each page once, by its best; a query is any text, its words joined by OR and none of it FTS5's syntax. Words are
compared without case, accents and English endings (unicode61, porter).

The file is written once, complete or not at all, and only read from then on, by any number of threads and processes.
The same pages in the same order give the same digest, the same results and the same scores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mgrpo.errors import ConfigError
from mgrpo.files import sync_folder
from mgrpo.tools.page import Heading, Link, Page

__all__ = ["Corpus", "Heading", "Hit", "Link", "Page"]

FORMAT = "mgrpo-corpus-1"
PASSAGE = 1000  # characters of a passage, about
WORDS = 64  # different words of a query that count
WEIGHTS = (2.0, 1.5, 1.0)  # of title, heading and text in bm25
SNIPPET = 48  # tokens of a snippet; FTS5 allows 64
COMMON = {
    "a", "an", "and", "are", "as", "at", "be", "by", "did", "do", "does", "for", "from", "had", "has",
    "have", "how", "in", "is", "it", "its", "of", "on", "or", "that", "the", "their", "there", "they",
    "this", "to", "was", "were", "what", "when", "where", "which", "who", "whose", "why", "will", "with",
}  # fmt: skip
"""Words that a query of others does without: nearly every passage has them, so they rank nothing and cost most."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pages (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, url TEXT NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    links TEXT NOT NULL, outline TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL
);
CREATE TABLE spans (id INTEGER PRIMARY KEY, page INTEGER NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL);
CREATE VIRTUAL TABLE passages USING fts5(title, heading, text, tokenize = 'porter unicode61 remove_diacritics 2');
"""
RANKED = f"""
SELECT rowid, rank FROM passages WHERE passages MATCH ? AND rank MATCH 'bm25({", ".join(map(str, WEIGHTS))})'
ORDER BY rank, rowid LIMIT ?
"""
SHOWN = f"""
SELECT p.url, p.title, snippet(passages, 2, '', '', '...', {SNIPPET}), passages.text
FROM passages JOIN spans s ON s.id = passages.rowid JOIN pages p ON p.id = s.page
WHERE passages MATCH ? AND passages.rowid = ?
"""  # of the passages that are shown alone: a snippet of each that matches would cost more than the search
WITHIN = f"""
SELECT s.start, s.stop FROM passages JOIN spans s ON s.id = passages.rowid
WHERE passages MATCH ? AND passages.rowid BETWEEN ? AND ? AND passages.rank MATCH 'bm25({", ".join(map(str, WEIGHTS))})'
ORDER BY passages.rank, passages.rowid
"""


@dataclass(frozen=True, slots=True)
class Hit:
    """A page that a search found. passage: the text of its best passage; score: higher is better."""

    url: str
    title: str
    snippet: str
    score: float
    passage: str = ""


class Corpus:
    """The pages of a file. Any thread may call it."""

    def __init__(self, path: str | Path) -> None:
        """See open()."""
        self.path = Path(path)
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        if not self.path.is_file():
            raise ConfigError(f"corpus {self.path}: no such file; mgrpo tools index makes one")
        try:
            with self._connection() as db:
                meta = dict(db.execute("SELECT key, value FROM meta"))
        except sqlite3.Error as error:
            self.close()
            raise ConfigError(f"corpus {self.path}: it is no corpus ({error})") from None
        if meta.get("format") != FORMAT:
            self.close()
            raise ConfigError(
                f"corpus {self.path}: format {meta.get('format')!r}, expected {FORMAT!r}; index it anew"
            )
        self.digest = str(meta["digest"])
        """SHA-256 of all pages in their order, as 64 hexadecimal digits."""
        self.size = int(meta["pages"])
        """Number of pages."""
        self.passages = int(meta["passages"])
        """Number of passages."""

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """The corpus in a file. Raises ConfigError for a file that is missing or of another format."""
        return cls(path)

    @classmethod
    def build(cls, path: str | Path, pages: Iterable[Page]) -> Corpus:
        """Write a corpus, replacing the file at `path`, and open it. Raises ValueError for a page without an address
        and for two of one address; the file is then as it was."""
        target = Path(path)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        os.close(handle)
        partial = Path(name)
        try:
            with closing(sqlite3.connect(partial, isolation_level=None)) as db:
                _write(db, pages)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o644)
            partial.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_folder(target.absolute().parent)
        return cls(target)

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best pages for a text, best first, equal ones in the corpus' order; fewer where fewer have a word of
        it."""
        match = _match(query)
        if not match or k < 1:
            return []
        with self._connection() as db:
            hits = []
            for passage, rank in _best(db, match, k):
                url, title, snippet, text = db.execute(SHOWN, (match, passage)).fetchone()
                hits.append(Hit(url, title, " ".join(snippet.split()), -rank, text))
        return hits

    def random(self, query: str, k: int) -> list[Hit]:
        """k pages that a hash of the query draws, in place of those that match it: a control."""
        drawn: dict[int, Hit] = {}
        with self._connection() as db:
            for number in range(100 * k):
                if len(drawn) >= min(k, self.size):
                    break
                seed = hashlib.sha256(f"{number}/{query}".encode("utf-8", "replace")).digest()
                page = int.from_bytes(seed[:8], "big") % self.size + 1
                if page not in drawn:
                    url, title, text = db.execute(
                        "SELECT url, title, text FROM pages WHERE id = ?", (page,)
                    ).fetchone()
                    drawn[page] = Hit(url, title, " ".join(text[:300].split()), 0.0, text[:PASSAGE])
        return list(drawn.values())

    def page(self, url: str) -> Page | None:
        """The page of an address, compared without scheme, "www.", fragment, closing slash and case of its host."""
        with self._connection() as db:
            row = _row(db, url)
        return None if row is None else _page(row)

    def nearest(self, page: Page, goal: str, chars: int) -> list[tuple[int, int]]:
        """Spans of a page's text: its passages that match a text best, up to `chars` characters, in the page's order;
        adjoining ones joined. Empty where none has a word of it."""
        match = _match(goal)
        if not match:
            return []
        with self._connection() as db:
            row = _row(db, page.url)
            ranked = [] if row is None else db.execute(WITHIN, (match, row["first"], row["last"])).fetchall()
        kept: list[tuple[int, int]] = []
        left = chars
        for start, stop in ranked:
            if stop - start > left and kept:
                break
            kept.append((start, min(stop, start + chars)))
            left -= stop - start
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(kept):
            if joined and not page.text[joined[-1][1] : start].strip():
                joined[-1] = joined[-1][0], stop
            else:
                joined.append((start, stop))
        return joined

    def pages(self) -> Iterator[Page]:
        """All pages in their order."""
        for number in range(1, self.size + 1):
            with self._connection() as db:
                yield _page(db.execute("SELECT * FROM pages WHERE id = ?", (number,)).fetchone())

    def close(self) -> None:
        """Close the file. Idempotent; a search that still runs closes its own connection at its end."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile."""
        with self._lock:
            if self._closed:
                raise ConfigError(f"corpus {self.path}: it is closed")
            db = self._idle.pop() if self._idle else None
        if db is None:
            uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
            db = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            db.row_factory = sqlite3.Row
        try:
            yield db
        finally:
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(db)
            if not keep:
                db.close()


def _write(db: sqlite3.Connection, pages: Iterable[Page]) -> None:
    """Fill an empty file."""
    db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA + "BEGIN;")
    digest = hashlib.sha256(FORMAT.encode())
    number, passage = 0, 0
    for number, page in enumerate(pages, 1):
        key = _key(page.url)
        if not key:
            raise ValueError(f"page {number} ({page.title!r:.60}) has the address {page.url!r}")
        links = json.dumps([[link.text, link.url] for link in page.links])
        outline = json.dumps([[h.text, h.level, h.start] for h in page.outline])
        first = passage + 1
        for start, stop, heading in passages(page):
            passage += 1
            db.execute("INSERT INTO spans VALUES (?, ?, ?, ?)", (passage, number, start, stop))
            row = (passage, page.title, heading, page.text[start:stop])
            db.execute("INSERT INTO passages (rowid, title, heading, text) VALUES (?, ?, ?, ?)", row)
        try:
            values = (number, key, page.url, page.title, page.text, links, outline, first, passage)
            db.execute("INSERT INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            raise ValueError(f"two pages have the address {page.url!r}") from None
        digest.update(json.dumps([page.url, page.title, page.text, links, outline]).encode())
    db.execute("INSERT INTO passages (passages) VALUES ('optimize')")
    meta = {"format": FORMAT, "digest": digest.hexdigest(), "pages": str(number), "passages": str(passage)}
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    db.execute("COMMIT")


def passages(page: Page) -> Iterator[tuple[int, int, str]]:
    """(start, stop, heading) of each passage of a page's text; one, maybe empty, where it has no text, so that its
    title can be found. Together they hold every character that is no white space."""
    headings = sorted(page.outline, key=lambda heading: heading.start)
    borders = [(0, ""), *((heading.start, heading.text) for heading in headings)]
    empty = True
    for number, (start, heading) in enumerate(borders):
        stop = borders[number + 1][0] if number + 1 < len(borders) else len(page.text)
        for a, b in _chunks(page.text, start, stop):
            empty = False
            yield a, b, heading
    if empty:
        yield 0, 0, ""


def _chunks(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Spans of about PASSAGE characters, cut behind an empty line, a line, a sentence or a word, whichever there is."""
    while start < stop:
        end = min(start + PASSAGE, stop)
        if end < stop:
            for border in ("\n\n", "\n", ". ", " "):
                cut = text.rfind(border, start + PASSAGE // 4, end)
                if cut >= 0:
                    end = cut + len(border)
                    break
        if text[start:end].strip():
            yield start, end
        start = end


def _best(db: sqlite3.Connection, match: str, k: int) -> list[tuple[int, float]]:
    """(passage, rank) of the best passage of each of the k best pages; a lower rank is better."""
    most = 4 * k
    while True:
        rows = db.execute(RANKED, (match, most)).fetchall()
        best: dict[int, tuple[int, float]] = {}
        for passage, rank in rows:
            page = db.execute("SELECT page FROM spans WHERE id = ?", (passage,)).fetchone()[0]
            best.setdefault(page, (passage, rank))
        if len(best) >= k or len(rows) < most:
            return list(best.values())[:k]
        most *= 4


def _match(query: str) -> str:
    """An FTS5 expression that any of a text's words satisfies; empty: it has none."""
    words = dict.fromkeys(re.findall(r"[^\W_]+", query.lower()))
    telling = [word for word in words if word not in COMMON] or list(words)
    return " OR ".join(f'"{word}"' for word in telling[:WORDS])


def _key(url: str) -> str:
    """What an address is compared by."""
    plain = re.sub(r"^[a-z][a-z0-9+.-]*://", "", unquote(url.strip()).partition("#")[0], flags=re.IGNORECASE)
    host, slash, path = plain.partition("/")
    return (host.lower().removeprefix("www.") + slash + path).rstrip("/")


def _row(db: sqlite3.Connection, url: str) -> Any:
    key = _key(url.encode("utf-8", "replace").decode())
    return db.execute("SELECT * FROM pages WHERE key = ?", (key,)).fetchone()


def _page(row: Any) -> Page:
    links = tuple(Link(text, url) for text, url in json.loads(row["links"]))
    outline = tuple(Heading(text, level, start) for text, level, start in json.loads(row["outline"]))
    return Page(row["url"], row["title"], row["text"], links, outline)
