"""Chains of relations that start at a named entity, as questions: `people of neighbour of country of Dodoma`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mgrpo.environments.task import Question, Split

MAX_HOPS = 3
Pools = tuple[list[Question], ...]


def in_words(start: str, plan: Sequence[str]) -> str:
    """plan: relations in the order they have to be followed, innermost first."""
    return " ".join(f"{relation} of" for relation in reversed(plan)) + f" {start}"


def start_of(question: Question) -> str:
    """The entity a question starts from."""
    return question.text.split()[-1]


def plan_of(question: Question) -> tuple[str, ...]:
    """Its relations in the order they have to be followed, innermost first."""
    return tuple(question.text.split()[-3::-2])


class QuestionBank:
    """Draws questions of one world: an endless training stream and fixed sets of every split."""

    def __init__(self, chains: Callable[[Split], Pools], weights: Sequence[float]) -> None:
        """chains: all questions of a split by number of relations, item h - 1 those with h. weights: of questions with
        1, 2 and 3 relations. Raises ValueError where they are no weights."""
        if len(weights) != MAX_HOPS or not all(0 <= w < math.inf for w in weights) or not sum(weights):
            raise ValueError(
                f"hop weights {tuple(weights)}, expected {MAX_HOPS} of at least 0, not all of them 0"
            )
        self._make = chains
        self._weights = tuple(w / sum(weights) for w in weights)
        self._chains: dict[Split, Pools] = {}

    def chains(self, split: Split) -> Pools:
        if split not in self._chains:
            self._chains[split] = self._make(split)
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
        for hops, (pool, wanted) in enumerate(zip(by_hops, np.diff(bounds), strict=True), 1):
            if wanted > len(pool):
                raise ValueError(
                    f"{n} questions of split {split!r} need {wanted} with {hops} hops, there are {len(pool)}"
                )
            drawn += [pool[i] for i in rng.choice(len(pool), size=wanted, replace=False)]
        return [drawn[i] for i in rng.permutation(n)]

    def with_hops(self, split: Split, hops: int, n: int, seed: int) -> list[Question]:
        """n distinct questions with `hops` relations, or all there are."""
        pool = self.chains(split)[hops - 1]
        rng = np.random.default_rng((seed, hops))
        return [pool[i] for i in rng.permutation(len(pool))[:n]]
