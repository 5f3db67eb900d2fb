"""What a judge's reply says: a verdict, a score, or nothing that counts.

The reply is first taken as the JSON object that was asked for, also with text around it. Judges that give no JSON end
with a line

    Verdict: correct                Score: 7

in any case, with Markdown's marks around it and an ASCII or a full-width colon. The line must hold nothing else: "not
correct", "correct or incorrect", "correct, but ..." are none. A reply of that one word alone counts too.

Strict, since a wrong verdict is worse than none, which is asked for again. Nothing that counts: two different verdicts,
wherever they stand; a verdict line that cannot be read beside one that can; an object with another value; thoughts
without an end. Letters ("Answer: B") are never read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TOP = 10
"""The best score of a rubric."""
MARK = r"[\s>#*_`\"'\-{}(),.\[\]\\]"
"""What may stand around a label: Markdown, quotes, a list's dash, the braces of an object on several lines."""
COLON = "[:=\uff1a\ufe55\u2236\ua789]"
"""A colon, full-width or not, or an equals sign."""

_BEFORE, _BEHIND = " \t\r\n*_`\"'([{", " \t\r\n*_`\"'.,!)]}"  # marks around a value; not "-3" nor ".7"
_THOUGHTS = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)


def parse_verdict(reply: str) -> bool | None:
    """True for correct, False for incorrect, None where the reply holds no single verdict."""
    return _parse(reply, "verdict", r"(?:in)?correct\b", _verdict_word)


def parse_score(reply: str) -> float | None:
    """The score of a rubric over TOP, 0..1; None where the reply holds no single whole number from 0 to TOP."""
    return _parse(reply, "score", r"\d+", _score_number)


def _verdict_word(value: object) -> bool | None:
    word = value.strip(_BEFORE + _BEHIND).lower() if isinstance(value, str) else ""
    return {"correct": True, "incorrect": False}.get(word)


def _score_number(value: object) -> float | None:
    if isinstance(value, str):
        found = re.fullmatch(rf"([0-9]{{1,3}})(?:\s*/\s*{TOP})?", value.lstrip(_BEFORE).rstrip(_BEHIND))
        value = int(found[1]) if found else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value / TOP if 0 <= value <= TOP and value == int(value) else None


def _parse(reply: str, label: str, short: str, read: Callable[[object], T | None]) -> T | None:
    """short: pattern of a value wherever it stands in a line."""
    text = _spoken(reply)
    if text is None:
        return None
    mention = re.compile(rf"{label}{MARK}*{COLON}{MARK}*({short})", re.IGNORECASE)
    found = _from_object(text, label)
    values: list[object] = [found[0]] if found else [*(_labelled(text, label) or [text])]
    around = found[1] if found else text
    said = [read(value) for value in [*values, *mention.findall(around)]]
    return said[0] if all(one is not None and one == said[0] for one in said) else None


def _spoken(reply: str) -> str | None:
    """The reply behind its thoughts; None where they have no end."""
    tags = list(_THOUGHTS.finditer(reply))
    if not tags:
        return reply
    return reply[tags[-1].end() :] if tags[-1][0].startswith("</") else None


def _from_object(text: str, label: str) -> tuple[object, str] | None:
    """(value of the label, the text around the object) where a JSON object has the label, spelled out, as a key of its
    own; a key that stands twice has the value None."""
    start, end = text.find("{"), text.rfind("}") + 1
    body = text[start:end] if start >= 0 else ""
    if not re.search(rf'"{label}"\s*:', body, re.IGNORECASE):
        return None
    outermost: list[tuple[str, object]] = []

    def kept(pairs: list[tuple[str, object]]) -> None:
        outermost[:] = pairs  # the outermost object is the last one to end

    try:
        json.loads(body, object_pairs_hook=kept)
    except (ValueError, RecursionError):
        return None
    values = [value for key, value in outermost if key.strip().lower() == label]
    if not values:
        return None
    return values[0] if len(values) == 1 else None, text[:start] + "\n" + text[end:]


def _labelled(text: str, label: str) -> list[str]:
    """What follows the label in each line that begins with it."""
    line = re.compile(rf"{MARK}*(?:(?:my|the|final)\s+)*{label}{MARK}*{COLON}(.*)", re.IGNORECASE | re.DOTALL)
    return [match[1] for text_line in text.splitlines() if (match := line.fullmatch(text_line))]
