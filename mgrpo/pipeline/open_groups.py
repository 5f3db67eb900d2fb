"""Which rollout starts next, while a constant number of them is in flight. No I/O and no clock.

    the next rollout of an open group first, of the oldest group first: a group that is complete early is worth more
    than two halves. Only when the open groups have none left is there room for another group.

A group may need weights that the engines do not hold yet; it waits for them, and younger groups do not pass it, since
they need the same or newer ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Open:
    waiting: list[int]  # rollouts not started, in order
    min_versions: dict[str, int]
    in_flight: set[int] = field(default_factory=set)


class OpenGroups:
    """The groups in one worker's hands, by index. At most `concurrency` rollouts are in flight, each starts once."""

    def __init__(self, concurrency: int) -> None:
        """Raises ValueError for a concurrency below 1."""
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency} must be at least 1")
        self.concurrency = concurrency
        self.in_flight = 0
        self._waiting = 0
        self._groups: dict[int, _Open] = {}
        self._order: list[int] = []  # heap of indices; one whose group has nothing waiting is passed

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, index: int) -> bool:
        return index in self._groups

    def add(self, index: int, rollouts: Iterable[int], min_versions: Mapping[str, int] | None = None) -> None:
        """Group number `index`, with the rollouts of it that are to be played. min_versions: of each role, the oldest
        weights to start it with. Raises ValueError for a group that is here already or has nothing to play."""
        waiting = sorted(set(rollouts))
        if index in self._groups:
            raise ValueError(f"group {index} is open already")
        if not waiting:
            raise ValueError(f"group {index} has no rollout to play")
        self._groups[index] = _Open(waiting, dict(min_versions or {}))
        self._waiting += len(waiting)
        heapq.heappush(self._order, index)

    def next(self, versions: Mapping[str, int] | None = None) -> tuple[int, int] | None:
        """(group, rollout) of the next one, from now on in flight; None while all places are taken, no open group has
        one left, or the oldest that has needs newer weights than `versions`: of each role, what its engine holds (None:
        whatever is needed)."""
        if self.in_flight >= self.concurrency or not self._waiting:
            return None
        while (oldest := self._groups.get(self._order[0])) is None or not oldest.waiting:
            heapq.heappop(self._order)
        index, group = self._order[0], oldest
        if versions is not None and any(versions[role] < v for role, v in group.min_versions.items()):
            return None
        rollout = group.waiting.pop(0)
        group.in_flight.add(rollout)
        self._waiting -= 1
        self.in_flight += 1
        return index, rollout

    def ended(self, index: int, rollout: int) -> bool:
        """The rollout is over, whatever came of it; True when it was the group's last. Raises ValueError for one that
        is not in flight."""
        group = self._groups.get(index)
        if group is None or rollout not in group.in_flight:
            raise ValueError(f"rollout {rollout} of group {index} is not in flight")
        group.in_flight.remove(rollout)
        self.in_flight -= 1
        return self._leave(index, group)

    def drop(self, index: int) -> bool:
        """Start no more rollouts of this group; True when none is in flight either. An unknown group is none."""
        group = self._groups.get(index)
        if group is None:
            return True
        self._waiting -= len(group.waiting)
        group.waiting.clear()
        return self._leave(index, group)

    def wants_group(self) -> bool:
        """Whether a place stays free that no open group fills."""
        return self.in_flight + self._waiting < self.concurrency

    def _leave(self, index: int, group: _Open) -> bool:
        over = not group.waiting and not group.in_flight
        if over:
            del self._groups[index]
        return over
