"""Questions: chains of one to three relations that start at a named entity.

    1 hop   R of COUNTRY                        country of CITY|PEOPLE
    2 hops  R of country of CITY|PEOPLE         R of neighbour of COUNTRY
    3 hops  R of neighbour of country of CITY|PEOPLE

A chain whose answer already appears in it is dropped. Hops weigh 1 : 2 : 1 by default. Countries of one split only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from mgrpo.environments.task import Question, Split
from mgrpo.tasks.atlas.facts import FIELDS, World
from mgrpo.tasks.words.questions import Pools, in_words
from mgrpo.tasks.words.questions import QuestionBank as Bank

HOP_WEIGHTS = (0.25, 0.5, 0.25)


def chains(world: World, split: Split) -> Pools:
    """All questions of a split by number of hops: item h - 1 holds those with h hops."""
    real = World() if world.altered else world
    by_hops: Pools = ([], [], [])
    for start, plan in _plans(world, split):
        values = world.follow(start, plan)
        if values is None or values[-1] in (start, *values[:-1]):
            continue
        truth = real.follow(start, plan)
        if world.altered and truth is not None and truth[-1] == values[-1]:
            continue  # documents and reality agree by chance: the question could not tell them apart
        info = {
            "hops": len(plan),
            "start": start,
            "real_answer": truth[-1] if truth else None,
        }
        by_hops[len(plan) - 1].append(Question(in_words(start, plan), values[-1], info))
    return by_hops


def _plans(world: World, split: Split) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(start entity, relations innermost first) of every template."""
    for country in world.countries[split]:
        for relation in FIELDS:
            yield country, (relation,)
            yield country, ("neighbour", relation)
        for name in (world.facts["capital", country], world.facts["people", country]):
            yield name, ("country",)
            for relation in FIELDS:
                yield name, ("country", relation)
                yield name, ("country", "neighbour", relation)


class QuestionBank(Bank):
    """Questions of a world of this task."""

    def __init__(self, world: World, weights: Sequence[float] = HOP_WEIGHTS) -> None:
        """weights: of questions with 1, 2 and 3 relations. Raises ValueError where they are no weights."""
        super().__init__(functools.partial(chains, world), weights)
