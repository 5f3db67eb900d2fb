"""What the researcher searches: library.txt, one fact a line, by the words that a query shares with it."""

from __future__ import annotations

import re
from pathlib import Path

_FILE = Path(__file__).parent / "library.txt"
_FACTS = [line.split(": ", 1) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}


def search(query: str) -> str:
    """Search the library. Returns the fact that fits best, or says that none does.

    Args:
        query: What to look for, e.g. "capital of Kenya".
    """
    asked = _words(query)
    about, fact = max(_FACTS, key=lambda entry: len(asked & _words(entry[0])))
    return fact if asked & _words(about) else "No entry has these words."
