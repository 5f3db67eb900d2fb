"""Chains: a start, one or two relations, a leaf; balanced, so that no answer is worth repeating.

    hops 2   What is the capital of the largest export partner of Fiji?
    hops 3   What is the capital of the largest export partner of the country that Fiji became independent from?

A chain that comes back to an entry it has passed is dropped. Sampling chains as they come has a constant that is right
for one in 45 (two hops) or 35 (three); so of all chains of a split, in an order drawn by the seed, one is taken where
its start has no question with its leaf yet and its answer is that of at most one question so far.

Splits: every entry belongs to one, by a hash of its code. A question's start and its end are both of its split, so that
no held-out question begins or ends where a training question does. Entries in the middle are of any split.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mgrpo.environments.task import Split
from mgrpo.tasks.factbook.facts import LEAVES, RELATIONS, Fact, Facts

HOPS = (2, 3)
SPLITS: tuple[tuple[Split, float], ...] = (("train", 0.6), ("validation", 0.78), ("heldout", 1.0))
"""Name and upper end of its share of the entries."""
SAME_ANSWER = 2
"""Questions of a split and a number of hops that have the same answer, at most."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One question before it is put in words: the facts, in the order in which they have to be found."""

    start: str
    """Code of the entry that the question names."""
    facts: tuple[Fact, ...]

    @property
    def hops(self) -> int:
        return len(self.facts)

    @property
    def leaf(self) -> Fact:
        return self.facts[-1]

    @property
    def codes(self) -> tuple[str, ...]:
        """Of the entries on whose pages its facts stand."""
        return (self.start, *(fact.target for fact in self.facts[:-1]))

    @property
    def id(self) -> str:
        return "/".join((self.start, *(fact.relation for fact in self.facts)))


def split_of(code: str) -> Split:
    """The split of an entry: a hash of its code, so that it does not depend on seed or names."""
    share = int.from_bytes(hashlib.sha256(f"0/{code}".encode()).digest()[:4], "big") / 2**32
    return next(name for name, end in SPLITS if share < end)


def all_chains(codes: Iterable[str], facts: Facts, hops: int) -> Iterator[Chain]:
    """Every chain of one number of hops that passes no entry twice."""
    for start in codes:
        for relations in itertools.product(RELATIONS, repeat=hops - 1):
            path, at, passed = [], start, {start}
            for relation in relations:
                if (fact := facts.get((at, relation))) is None or fact.target in passed:
                    break
                path.append(fact)
                passed.add(at := fact.target)
            else:
                for leaf in LEAVES:
                    if (fact := facts.get((at, leaf))) is not None:
                        yield Chain(start, (*path, fact))


def balanced(chains: Iterable[Chain], seed: int) -> list[Chain]:
    """Those that make the questions, split by split; see the module's docstring. Names decide nothing, so that a
    renamed world has the same."""
    found: list[Chain] = []
    for split, _ in SPLITS:
        inside = [c for c in chains if split_of(c.codes[0]) == split == split_of(c.codes[-1])]
        found += _spread(sorted(inside, key=lambda chain: _rank(chain, seed)))
    return found


def _spread(chains: Sequence[Chain]) -> list[Chain]:
    answers: Counter[str] = Counter()
    taken: set[tuple[str, str]] = set()
    kept = []
    for chain in chains:
        leaf, answer = chain.leaf.relation, chain.leaf.answers[0]
        if answers[answer] < SAME_ANSWER and (chain.start, leaf) not in taken:
            answers[answer] += 1
            taken.add((chain.start, leaf))
            kept.append(chain)
    return kept


def _rank(chain: Chain, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{chain.id}".encode()).digest()
