"""Texts of models, documents and peers, made safe for a terminal."""

from __future__ import annotations

import re

_ODD = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def clean(text: str) -> str:
    """Control and direction characters as visible signs, so that no text moves the cursor, changes colours or reorders
    what stands beside it. New lines stay."""
    return _ODD.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"
