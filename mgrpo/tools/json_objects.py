"""The JSON objects in a turn of a language model, read generously: amid other words, and with the commonest mistakes.

What may be wrong with the first of them and is mended: closing braces that are missing at the end of the text, Python's
quotes and constants, a code fence that begins and does not end. Whether such a turn counts as well-formed is the
caller's matter: a mended object reaches beyond the end of the text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_CANDIDATES = 8
"""Opening braces of one turn that are tried as the beginning of an object."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object and its place: value is what text[start:end] says. end > len(text): it was mended."""

    value: dict[Any, object]
    start: int
    end: int


def objects(text: str, limit: int = MAX_CANDIDATES) -> Iterator[Found]:
    """The objects in a text from left to right, none inside another. `limit` candidates are looked at, and the first is
    mended where that helps. Keys are texts, except in what was mended."""
    at = text.find("{")
    for number in range(limit):
        if at < 0:
            return
        value, end = read_json(text, at)
        if value is None and number == 0:
            value, end = _mended(text, at)
        if isinstance(value, dict):
            yield Found(value, at, end)
        at = text.find("{", max(end, at + 1))


def read_json(text: str, at: int) -> tuple[object, int]:
    """(value, its end) of the JSON that begins at text[at]; (None, at) where there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):  # a turn may nest a thousand brackets
        return None, at


def _mended(text: str, at: int) -> tuple[object, int]:
    """As read_json, of all that is left, with what may be missing at its end and with Python's quotes. The end lies
    behind the text: what was mended is never all of it."""
    rest = text[at:].strip("` \n")
    for ending in ("", "}", "}}", '"}}'):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(rest + ending), len(text) + 1
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
    return None, at
