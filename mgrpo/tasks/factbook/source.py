"""The world's questions as a source: splits by start and end entity, and an endless training stream."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mgrpo.environments.task import Question, Split
from mgrpo.tasks.factbook.chains import HOPS, SPLITS
from mgrpo.tasks.factbook.world import World

KEPT_EPOCHS = 4


class FactbookSource:
    """A QuestionSource over a world."""

    def __init__(self, world: World, hops: Collection[int] = HOPS) -> None:
        """hops: of the questions that are asked. Raises ValueError for other numbers than there are."""
        if not hops or not set(hops) <= set(HOPS):
            raise ValueError(f"hops {sorted(hops)}, expected some of {list(HOPS)}")
        self._of: dict[str, list[Question]] = {split: [] for split, _ in SPLITS}
        for question in world.questions:
            if question.info["hops"] in hops:
                self._of[str(question.info["split"])].append(question)
        self._orders: dict[tuple[int, int], list[int]] = {}

    def question(self, index: int, seed: int) -> Question:
        """Number `index` of the stream of `seed`: each epoch has every training question once, in an order of its
        own."""
        if index < 0:
            raise ValueError(f"index {index}, expected 0 or more")
        epoch, place = divmod(index, len(self._of["train"]))
        return self._of["train"][self._order(seed, epoch)[place]]

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        """n questions of a split in an order that `seed` decides. Raises ValueError where a split has fewer."""
        if split not in self._of:
            raise ValueError(f"split {split!r}, expected one of {', '.join(self._of)}")
        pool = self._of[split]
        if not 1 <= n <= len(pool):
            raise ValueError(f"{n} questions of split {split!r}, expected 1 to {len(pool)}")
        order = np.random.default_rng((seed, 7)).permutation(len(pool))
        return [pool[i] for i in order[:n]]

    def _order(self, seed: int, epoch: int) -> list[int]:
        """The training questions of an epoch."""
        key = seed, epoch
        if key not in self._orders:
            while len(self._orders) >= KEPT_EPOCHS:
                self._orders.pop(next(iter(self._orders)))
            order = np.random.default_rng((seed, epoch)).permutation(len(self._of["train"]))
            self._orders[key] = [int(i) for i in order]
        return self._orders[key]
