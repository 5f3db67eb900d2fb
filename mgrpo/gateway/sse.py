"""Server-sent events as SDKs read them. JSON is written in ASCII: some clients split lines at U+2028 too."""

from __future__ import annotations

import json
from collections.abc import Mapping

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: SDKs skip it, and every clock between them and us starts anew."""
DONE = b"data: [DONE]\n\n"


def dumps(value: Mapping[str, object]) -> bytes:
    """JSON of texts that may hold anything, lone surrogates included."""
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def event(data: Mapping[str, object], name: str | None = None) -> bytes:
    """One event. name: of its `event:` line, which Chat Completions has not."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(data) + b"\n\n"
