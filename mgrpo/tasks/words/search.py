"""Full-text search over the corpus: SQLite FTS5, bm25, the title weighs 6 times the body, the best few.

Their order is shuffled by a hash of the query, so that rank says nothing and a policy has to read
titles. Where fewer documents match, hash-chosen ones fill up: the number of results never changes.
search = "random" replaces all of them by hash-chosen documents, the control in which nothing can be known.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Literal

import numpy as np

from mgrpo.tasks.words.documents import Document, stable_hash

SearchMode = Literal["bm25", "random"]
TITLE_WEIGHT = 6.0


class Index:
    """Titles of the best documents of a query. Answers are remembered: the corpus has few words."""

    def __init__(self, documents: Iterable[Document], mode: SearchMode = "bm25", results: int = 3) -> None:
        if mode not in ("bm25", "random"):
            raise ValueError(f"search={mode!r}, expected 'bm25' or 'random'")
        self.mode = mode
        self._results = results
        documents = list(documents)
        self._titles = [d.title for d in documents]
        self._found: dict[str, tuple[str, ...]] = {}
        # Used by one event loop at a time, possibly in another thread than the one that built it.
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        # '+' and '_' belong to words: +679 is a calling code, en_ a language.
        self._db.execute(
            "CREATE VIRTUAL TABLE docs USING fts5(title, body, tokenize = \"unicode61 tokenchars '+_'\")"
        )
        self._db.executemany("INSERT INTO docs VALUES (?, ?)", [(d.title, d.body) for d in documents])

    def search(self, query: str) -> tuple[str, ...]:
        """As many distinct titles as it has results. Any text is a valid query; it is matched as one phrase."""
        found = self._found.get(query)
        if found is None:
            found = self._found[query] = self._search(query)
        return found

    def _search(self, query: str) -> tuple[str, ...]:
        rng = np.random.default_rng(stable_hash(query))
        titles = self._match(query) if self.mode == "bm25" else []
        while len(titles) < self._results:
            title = self._titles[int(rng.integers(len(self._titles)))]
            if title not in titles:
                titles.append(title)
        return tuple(titles[i] for i in rng.permutation(self._results))

    def _match(self, query: str) -> list[str]:
        return self._best(phrase(query), self._results)

    def _best(self, pattern: str, n: int) -> list[str]:
        """The n best titles of a pattern in the words of FTS5."""
        rows = self._db.execute(
            "SELECT title FROM docs WHERE docs MATCH ? ORDER BY bm25(docs, ?, 1.0), rowid LIMIT ?",
            (pattern, TITLE_WEIGHT, n),
        )
        return [str(title) for (title,) in rows]

    def close(self) -> None:
        self._db.close()


def phrase(text: str) -> str:
    """The pattern that finds a text as one phrase."""
    return '"' + text.replace('"', '""').replace("\0", " ") + '"'
