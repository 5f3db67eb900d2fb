"""The order in which a streaming worker starts rollouts, as a pure rule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.pipeline.open_groups import OpenGroups


@settings(deadline=None)
@given(
    concurrency=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    data=st.data(),
)
def test_every_rollout_starts_once_and_the_bound_holds(
    concurrency: int, sizes: list[int], data: st.DataObject
) -> None:
    """Whatever ends when: never more in flight than allowed, no place free that work could fill, oldest group first,
    each rollout exactly once, and each group is over exactly once."""
    groups = OpenGroups(concurrency)
    unopened = list(enumerate(sizes))
    started: list[tuple[int, int]] = []
    running: list[tuple[int, int]] = []
    left: dict[int, int] = {}
    over: list[int] = []
    while unopened or running or any(left.values()):
        while groups.wants_group() and unopened:
            index, size = unopened.pop(0)
            groups.add(index, range(size))
            left[index] = size
        while (pair := groups.next()) is not None:
            assert pair[0] == min(i for i, n in left.items() if n)
            left[pair[0]] -= 1
            started.append(pair)
            running.append(pair)
        assert len(running) == groups.in_flight <= concurrency
        assert groups.in_flight == concurrency or not (unopened or any(left.values()))
        pair = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if groups.ended(*pair):
            over.append(pair[0])
    everything = [(i, k) for i, size in enumerate(sizes) for k in range(size)]
    assert started == everything and sorted(over) == list(range(len(sizes)))
    assert not len(groups)


def test_a_group_waits_for_its_weights_and_is_not_passed() -> None:
    """Weights that come late hold back the group and the younger ones, and no further group is asked for."""
    groups = OpenGroups(3)
    groups.add(5, [0, 2], {"main": 2})
    groups.add(6, [0], {"main": 1})
    assert groups.next({"main": 1}) is None and not groups.wants_group()
    assert [groups.next({"main": 2}) for _ in range(4)] == [(5, 0), (5, 2), (6, 0), None]


def test_an_older_group_comes_first_even_when_it_is_added_later() -> None:
    """A group that is taken over from a dead worker is older than what this one plays."""
    groups = OpenGroups(2)
    groups.add(9, range(4))
    assert groups.next() == (9, 0)
    groups.add(3, [1])
    assert groups.next() == (3, 1)
    assert groups.next() is None
    assert groups.ended(9, 0) is False and groups.next() == (9, 1)


def test_a_dropped_group_starts_nothing_more() -> None:
    """What is in flight of it ends by itself; its places go to the next group."""
    groups = OpenGroups(2)
    groups.add(0, range(5))
    assert groups.next() == (0, 0)
    assert groups.drop(0) is False and groups.wants_group() and groups.next() is None
    groups.add(1, [0])
    assert groups.next() == (1, 0)
    assert groups.ended(0, 0) is True and 0 not in groups
    assert groups.drop(1) is False and groups.drop(7) is True


def test_misuse_is_refused_by_number() -> None:
    """The caller's bugs."""
    with pytest.raises(ValueError, match="concurrency 0"):
        OpenGroups(0)
    groups = OpenGroups(1)
    groups.add(2, [0])
    with pytest.raises(ValueError, match="group 2 is open already"):
        groups.add(2, [1])
    with pytest.raises(ValueError, match="group 3 has no rollout"):
        groups.add(3, [])
    with pytest.raises(ValueError, match="rollout 0 of group 2 is not in flight"):
        groups.ended(2, 0)
