"""Reading what a server sent: JSON or text, its own words of a refusal, the seconds it asks to be left alone."""

from __future__ import annotations

import email.utils
import json
import time
from datetime import UTC


def seconds_of(retry_after: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, given as a number or as a date; None where it says nothing. now:
    seconds since 1970, for tests."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


def decoded(body: bytes, kind: str) -> object:
    """The JSON of a body; kind: its content type. Raises ValueError saying what it is instead."""
    if not body.strip():
        raise ValueError("the body is empty")
    if "html" in kind or body.lstrip()[:1] == b"<":
        raise ValueError(f"the body is no JSON but a page: {_shown(body)}")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON ({error}): {_shown(body)}") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON")


def as_text(body: bytes, kind: str) -> str:
    """A body in the charset of its content type, UTF-8 where that names none; broken bytes are replaced."""
    charset = kind.partition("charset=")[2].partition(";")[0].strip(" \"'") or "utf-8"
    try:
        return body.decode(charset, "replace")
    except LookupError:
        return body.decode("utf-8", "replace")


def message_of(body: bytes) -> str:
    """The server's own message in one short line."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = _shown(body)
    if isinstance(found, dict):
        inner = next((found[key] for key in ("error", "message", "detail") if key in found), found)
        found = inner.get("message", inner) if isinstance(inner, dict) else inner
    return one_line(str(found))


def _shown(body: bytes) -> str:
    return repr(body[:80].decode("utf-8", "replace"))


def one_line(text: str) -> str:
    """At most 200 characters."""
    return " ".join(text.split())[:200]


def without(key: str | None, text: str) -> str:
    """text without the key, which services repeat in their errors."""
    return text.replace(key, "***") if key else text
