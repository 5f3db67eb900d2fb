"""Facts that can be followed from entity to entity."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

FactsMode = Literal["real", "permuted"]


class World:
    """facts: (relation, entity) -> value."""

    def __init__(self, facts: dict[tuple[str, str], str]) -> None:
        self.facts = facts

    def value(self, relation: str, entity: str) -> str | None:
        """What the documents say about (relation, entity); None when the question makes no sense."""
        return self.facts.get((relation, entity))

    def follow(self, entity: str, plan: Sequence[str]) -> list[str] | None:
        """The value after each relation of `plan` (innermost first), or None where the chain breaks."""
        values: list[str] = []
        for relation in plan:
            value = self.value(relation, entity)
            if value is None:
                return None
            values.append(value)
            entity = value
        return values


def fold(text: str) -> str:
    """ASCII letters and digits of a name, accents dropped: `Côte d'Ivoire` -> `CotedIvoire`."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "".join(c for c in ascii_text if c.isalnum())
