"""Which groups are one worker's, by number: those of its class, index mod workers, and those of dead workers' classes.

No I/O and no clock. The live workers, sorted by number, divide the classes of the dead: class c goes to the one at
place c mod their count. Every worker comes to the same division by itself; where two see the living differently for a
moment, the store lets only one of them hold a group.
"""

from __future__ import annotations

from collections.abc import Collection


class GroupShare:
    """The next group that worker `number` of `workers` may open."""

    def __init__(self, number: int, workers: int, first: int = 0) -> None:
        """first: no group before this index is needed any more."""
        self._number, self._workers = number, workers
        self._next = {number: self._first_of(number, first)}  # class -> index of its next group
        self._aside: set[int] = set()  # passed for now
        self._again: set[int] = set()  # set aside before, to be tried again

    def divide(self, live: Collection[int], first: int) -> None:
        """Take over what dead workers leave, and give back what is a living one's. live: numbers of the workers that
        are not dead; a class that is new here begins at the first of its indices from `first` on."""
        among = sorted({*live, self._number})
        dead = [c for c in range(self._workers) if c not in among]
        mine = [self._number, *(c for c in dead if among[c % len(among)] == self._number)]
        self._next = {c: self._next.get(c, self._first_of(c, first)) for c in mine}
        self._aside = {index for index in self._aside if index % self._workers in self._next}
        self._again = {index for index in self._again if index % self._workers in self._next}

    def classes(self) -> list[int]:
        """Those that are this worker's now."""
        return sorted(self._next)

    def next(self, leave_out: Collection[int] = ()) -> int:
        """Index of the oldest group not passed yet, those in `leave_out` aside."""
        return min([*(self._free(index, leave_out) for index in self._next.values()), *self._again])

    def passed(self, index: int) -> None:
        """This group is opened, or not to be."""
        self._again.discard(index)
        c = index % self._workers
        if index >= self._next.get(c, index + 1):
            self._next[c] = index + self._workers

    def set_aside(self, index: int) -> None:
        """This group is in another worker's hands: the next ones come first, until retry()."""
        self.passed(index)
        self._aside.add(index)

    def retry(self) -> None:
        """What was set aside may be free by now."""
        self._again |= self._aside
        self._aside.clear()

    def _free(self, index: int, leave_out: Collection[int]) -> int:
        while index in leave_out:
            index += self._workers
        return index

    def _first_of(self, c: int, first: int) -> int:
        return first + (c - first) % self._workers
