"""What a search finds and an agent opens: a title, then fields with their values."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """title, then (relation, value) pairs in the order they are written."""

    title: str
    fields: tuple[tuple[str, str], ...]

    @property
    def body(self) -> str:
        return " ".join(f"{relation} {value}" for relation, value in self.fields)

    @property
    def text(self) -> str:
        return f"{self.title} {self.body}"

    def value(self, relation: str) -> str | None:
        return dict(self.fields).get(relation)


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
