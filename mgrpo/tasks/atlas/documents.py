"""The corpus: 543 documents about 181 countries, their capitals and their peoples.

    country   Fiji people Fijian language en_ phone +679 region Melanesia currency FJD capital Suva
    city      Suva country Fiji
    people    Fijian country Fiji

A value stands only in the document it belongs to: a wrong document that was opened cannot answer by luck.
"""

from __future__ import annotations

from mgrpo.tasks.atlas.facts import FIELDS, SPLIT_SIZES, World
from mgrpo.tasks.words.documents import Document, stable_hash


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
