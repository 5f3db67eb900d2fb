"""A step's named times: spans and seconds of the same measurement, which never disagree and never count twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mgrpo.pipeline.step_clock import METRICS, StepClock
from mgrpo.record import spans


class Hand:
    """A clock that is set by hand, in seconds, and what was recorded by it."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.kept: list[tuple[str, float, float, spans.Args]] = []

    def now(self) -> int:
        return round(self.seconds * 1e9)

    def add(
        self, kind: str, name: str, lane: str, start: int, end: int, args: spans.Args | None = None
    ) -> None:
        assert (name, lane) == ("main", "main")
        self.kept.append((kind, start / 1e9, end / 1e9, args or {}))


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    found = Hand()
    monkeypatch.setattr(spans, "now", found.now)
    monkeypatch.setattr(spans, "add", found.add)
    yield found


def test_parts_are_spans_and_seconds(hand: Hand) -> None:
    """Each part's seconds are its span's, the step's are the sum, and the rest is left over."""
    clock = StepClock("main")
    clock.start()
    with clock.part("wait", {"step": 4}):
        hand.seconds += 3
    clock.begin("train")
    hand.seconds += 2
    clock.finish("train", {"step": 4})
    hand.seconds += 1  # nobody's
    seconds = clock.end(4)
    assert hand.kept == [
        ("wait", 100, 103, {"step": 4}),
        ("train", 103, 105, {"step": 4}),
        ("step", 100, 106, {"step": 4}),
    ]
    assert seconds == dict.fromkeys(METRICS.values(), 0.0) | {
        "step": 6.0, "wait_batch": 3.0, "train": 2.0, "other": 1.0
    }  # fmt: skip


def test_a_part_within_a_part_counts_once(hand: Hand) -> None:
    """The wait for a record within a checkpoint is a span within its span, and no second of the checkpoint's."""
    clock = StepClock("main")
    clock.start()
    with clock.part("checkpoint"):
        hand.seconds += 1
        with clock.part("report"):
            hand.seconds += 4
        hand.seconds += 1
    assert [entry[:3] for entry in hand.kept] == [("report", 101, 105), ("checkpoint", 100, 106)]
    seconds = clock.end(0)
    assert (seconds["checkpoint"], seconds["record"], seconds["other"]) == (2.0, 4.0, 0.0)


def test_a_part_is_divided_where_the_step_ends(hand: Hand) -> None:
    """The last step ends within its checkpoint: each side gets its own seconds and its own span."""
    clock = StepClock("main")
    clock.start()
    with clock.part("checkpoint"):
        hand.seconds += 2
        assert clock.end(0)["checkpoint"] == 2.0
        hand.seconds += 3
    assert clock.end(1)["checkpoint"] == 3.0
    assert [entry[:3] for entry in hand.kept] == [
        ("checkpoint", 100, 102), ("step", 100, 102), ("checkpoint", 102, 105), ("step", 102, 105)
    ]  # fmt: skip


def test_what_came_before_the_first_step_is_none_of_it(hand: Hand) -> None:
    """The weights that a run begins with are published before its first step; a part that raises has ended."""
    clock = StepClock("main")
    with pytest.raises(KeyError), clock.part("publish"):
        hand.seconds += 5
        raise KeyError
    assert not clock.running and not clock.inside("publish")
    clock.start()
    hand.seconds += 1
    assert clock.end(0) == dict.fromkeys(METRICS.values(), 0.0) | {"step": 1.0, "other": 1.0}
    assert [entry[0] for entry in hand.kept] == ["publish", "step"]
