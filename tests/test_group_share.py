"""Which groups a worker opens, and what becomes of a dead worker's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.pipeline.group_share import GroupShare


def taken(share: GroupShare, n: int) -> list[int]:
    """The next n groups, each opened as it comes."""
    found = []
    for _ in range(n):
        found.append(share.next())
        share.passed(found[-1])
    return found


def test_each_worker_opens_its_class_in_order() -> None:
    """Also from the middle of a run, whatever index that is."""
    assert taken(GroupShare(1, 4), 3) == [1, 5, 9]
    assert [taken(GroupShare(n, 4, 10), 2) for n in range(4)] == [[12, 16], [13, 17], [10, 14], [11, 15]]


@settings(deadline=None)
@given(workers=st.integers(1, 6), first=st.integers(0, 30), data=st.data())
def test_the_living_divide_all_groups(workers: int, first: int, data: st.DataObject) -> None:
    """Whoever is dead: every group from `first` on is exactly one living worker's."""
    live = data.draw(st.sets(st.integers(0, workers - 1), min_size=1))
    found: list[int] = []
    for number in live:
        share = GroupShare(number, workers, first)
        share.divide(live, first)
        while share.next() < first + 3 * workers:
            found += taken(share, 1)
    assert sorted(found) == list(range(first, first + 3 * workers))


def test_a_class_is_taken_over_and_given_back() -> None:
    """Worker 0 of 2: what it has opened stays opened, what the dead worker may have left open comes first."""
    share = GroupShare(0, 2)
    assert taken(share, 3) == [0, 2, 4]
    share.divide({0}, 2)
    assert share.classes() == [0, 1] and taken(share, 4) == [3, 5, 6, 7]
    share.divide({0, 1}, 6)
    assert share.classes() == [0] and taken(share, 2) == [8, 10]
    share.passed(9)  # a request for it was under way
    share.divide({0}, 6)
    assert share.next(leave_out={7, 9}) == 11
    assert taken(share, 3) == [7, 9, 11]


def test_what_another_worker_holds_is_tried_again_later() -> None:
    """It holds back none of the younger ones, is the first when it may be free, and is forgotten with its class."""
    share = GroupShare(0, 2)
    share.divide({0}, 0)
    assert taken(share, 1) == [0]
    share.set_aside(1)
    assert taken(share, 2) == [2, 3]
    share.retry()
    assert share.next() == 1
    share.set_aside(1)
    assert taken(share, 1) == [4]
    share.retry()
    share.divide({0, 1}, 0)
    assert share.next() == 6
