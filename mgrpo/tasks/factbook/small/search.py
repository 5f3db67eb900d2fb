"""A search for an entity and a section: the page, and pages that are easily taken for it.

Of the four results two have the entity or the section in their title, best first (SQLite FTS5, bm25): the page itself
where there is one, and another section of the same entity. The other two only mention the entity. Their order says
nothing; hash-chosen pages fill up (words/search.py).
"""

from __future__ import annotations

from mgrpo.tasks.words.search import Index, phrase

BY_TITLE = 2


class PageIndex(Index):
    """Titles and queries are an entity and a section."""

    def _match(self, query: str) -> list[str]:
        words = query.split()
        titles = self._best(f"title : ({' OR '.join(map(phrase, words))})", BY_TITLE)
        mentions = self._best(f"body : {phrase(words[0])}", self._results)
        return (titles + [title for title in mentions if title not in titles])[: self._results]
