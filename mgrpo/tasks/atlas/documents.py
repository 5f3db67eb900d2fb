"""The corpus: 543 documents about 181 countries, their capitals and their peoples.

    country   Fiji people Fijian language en_ phone +679 region Melanesia currency FJD capital Suva
    city      Suva country Fiji
    people    Fijian country Fiji

A value stands only in the document it belongs to: a wrong document that was opened cannot answer by luck.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from mgrpo.tasks.atlas.facts import FIELDS, SPLIT_SIZES, World


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


def build_documents(world: World) -> dict[str, Document]:
    """Title -> document, for all splits: training sees held-out documents as distractors at most."""
    documents: dict[str, Document] = {}
    for split in SPLIT_SIZES:
        for name in world.countries[split]:
            fields = [(r, v) for r in FIELDS if (v := world.value(r, name)) is not None]
            fields.sort(key=lambda field: stable_hash(f"{name} {field[0]}"))
            titles = [Document(name, tuple(fields))]
            for relation in ("capital", "people"):
                value = world.facts[relation, name]
                titles.append(Document(value, (("country", name),)))
            documents.update((d.title, d) for d in titles)
    return documents


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
