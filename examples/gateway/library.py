"""What the researcher searches: library.jsonl, one document a line, by the words that a query shares with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

_FILE = Path(__file__).parent / "library.jsonl"
_DOCUMENTS = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def search(query: str) -> str:
    """Search the library. Returns the document that fits best, or says that none does.

    Args:
        query: What to look for, e.g. a country's name.
    """
    asked = _words(query)
    scored = [(2 * len(asked & _words(d["title"])) + len(asked & _words(d["text"])), d) for d in _DOCUMENTS]
    best, document = max(scored, key=lambda entry: entry[0])
    return f"{document['title']}: {document['text']}" if best else "No document has these words."
