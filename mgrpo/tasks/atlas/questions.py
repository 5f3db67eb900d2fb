"""Questions: chains of one to three relations that start at a named entity.

    1 hop   R of COUNTRY                        country of CITY|PEOPLE
    2 hops  R of country of CITY|PEOPLE         R of neighbour of COUNTRY
    3 hops  R of neighbour of country of CITY|PEOPLE

A chain whose answer already appears in it is dropped. Hops weigh 1 : 2 : 1 by default. Countries of one split only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mgrpo.environments.task import Question, Split
from mgrpo.tasks.atlas.facts import FIELDS, World

HOP_WEIGHTS = (0.25, 0.5, 0.25)
MAX_HOPS = 3


def chains(world: World, split: Split) -> tuple[list[Question], ...]:
    """All questions of a split by number of hops: item h - 1 holds those with h hops."""
    real = World() if world.altered else world
    by_hops: tuple[list[Question], ...] = ([], [], [])
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
        text = " ".join(f"{relation} of" for relation in reversed(plan)) + f" {start}"
        by_hops[len(plan) - 1].append(Question(text, values[-1], info))
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


def start_of(question: Question) -> str:
    """The entity a question starts from."""
    return question.text.split()[-1]


def plan_of(question: Question) -> tuple[str, ...]:
    """Its relations in the order they have to be followed, innermost first."""
    return tuple(question.text.split()[-3::-2])


class QuestionBank:
    """Draws questions of one world: an endless training stream and fixed sets of every split."""

    def __init__(self, world: World, weights: Sequence[float] = HOP_WEIGHTS) -> None:
        """weights: of questions with 1, 2 and 3 relations. Raises ValueError where they are no weights."""
        if len(weights) != MAX_HOPS or not all(0 <= w < math.inf for w in weights) or not sum(weights):
            raise ValueError(
                f"hop weights {tuple(weights)}, expected {MAX_HOPS} of at least 0, not all of them 0"
            )
        self._world = world
        self._weights = tuple(w / sum(weights) for w in weights)
        self._chains: dict[Split, tuple[list[Question], ...]] = {}

    def chains(self, split: Split) -> tuple[list[Question], ...]:
        if split not in self._chains:
            self._chains[split] = chains(self._world, split)
        return self._chains[split]

    def draw(self, index: int, seed: int) -> Question:
        """Training question `index` of the stream `seed`."""
        if index < 0:
            raise ValueError(f"question index {index} is negative")
        rng = np.random.default_rng((seed, index))
        pool = self.chains("train")[rng.choice(MAX_HOPS, p=self._weights)]
        return pool[int(rng.integers(len(pool)))]

    def fixed(self, split: Split, n: int, seed: int) -> list[Question]:
        """n distinct questions in the hop mix, interleaved. ValueError when a split has fewer."""
        by_hops = self.chains(split)
        if n < 1:
            raise ValueError(f"n={n} questions; expected at least 1")
        bounds = np.rint(np.cumsum((0.0, *self._weights)) * n).astype(int)
        rng = np.random.default_rng((seed, 7))
        drawn: list[Question] = []
        for pool, wanted in zip(by_hops, np.diff(bounds), strict=True):
            if wanted > len(pool):
                raise ValueError(
                    f"{n} questions of split {split!r} need {wanted} with {pool[0].info['hops']} hops, "
                    f"there are {len(pool)}"
                )
            drawn += [pool[i] for i in rng.choice(len(pool), size=wanted, replace=False)]
        return [drawn[i] for i in rng.permutation(n)]

    def with_hops(self, split: Split, hops: int, n: int, seed: int) -> list[Question]:
        """n distinct questions with `hops` relations, or all there are."""
        pool = self.chains(split)[hops - 1]
        rng = np.random.default_rng((seed, hops))
        return [pool[i] for i in rng.permutation(len(pool))[:n]]
