"""The timeline of the last steps: bars that tell of every second where it went."""

from __future__ import annotations

from typing import Any

import pytest

from mgrpo.view.timeline import ROLLOUTS, as_text, timeline


def step(number: int, end: float, seconds: float, **parts: float) -> dict[str, Any]:
    """A line of metrics.jsonl about a step of the main agent."""
    named = {f"main/time/{name}": value for name, value in parts.items()}
    return {"step": number, "time": end, "main/time/step": seconds, **named}


def busy(version: int, time: float, share: float) -> dict[str, Any]:
    return {"step": version, "time": time, "rollout/perf/busy": share}


STEPS = [
    step(1, 10.0, 10.0, wait_batch=7.0, train=2.0, weights=0.5, other=0.5),
    busy(0, 10.2, 0.5),
    busy(0, 10.4, 0.7),
    step(2, 14.0, 4.0, wait_batch=1.0, train=2.0, weights=0.5, other=0.5),
    busy(1, 14.1, 1.0),
]


def test_the_bars_of_a_step_fill_it() -> None:
    """Each part has its seconds, in order and without a gap; a worker's share is the mean of all workers'."""
    found = timeline(STEPS, ["main", "sub"])
    assert found is not None and list(found.rows) == [ROLLOUTS, "main"]
    bars = [(b.step, b.part, b.start, b.end) for b in found.rows["main"]]
    assert bars == [
        (1, "wait_batch", 0.0, 7.0), (1, "train", 7.0, 9.0), (1, "weights", 9.0, 9.5), (1, "other", 9.5, 10.0),
        (2, "wait_batch", 10.0, 11.0), (2, "train", 11.0, 13.0), (2, "weights", 13.0, 13.5), (2, "other", 13.5, 14.0),
    ]  # fmt: skip
    shares = [(b.step, b.start, b.end, b.share) for b in found.rows[ROLLOUTS]]
    assert shares == [(0, 0.0, 10.4, pytest.approx(0.6)), (1, 10.4, 14.1, 1.0)]
    assert (found.start, found.end) == (0.0, 14.1)


def test_only_the_last_steps_are_shown() -> None:
    """What the rollout workers did before them is cut off."""
    found = timeline(STEPS, ["main"], last=1)
    assert found is not None and found.start == 10.0
    assert {b.step for b in found.rows["main"]} == {2}
    assert [(b.start, b.end) for b in found.rows[ROLLOUTS]] == [(10.0, 10.4), (10.4, 14.1)]


def test_bars_never_overlap_and_other_names_are_no_harm() -> None:
    """Records that were written together and late, parts that are unknown or sum to more than the step, missing
    numbers: every step has its whole length all the same."""
    odd = [
        step(1, 9.4, 5.0, wait_batch=9.0),
        step(2, 9.5, 3.0, train=1.0, build=2.0),
        step(3, 9.5, 2.0, wait_batch=0.5) | {"main/time/weights": None},
    ]
    found = timeline(odd, ["main"])
    assert found is not None
    bars = found.rows["main"]
    assert [(b.step, b.part, b.start, b.end) for b in bars] == [
        (1, "wait_batch", -0.5, 4.5), (2, "train", 4.5, 5.5), (2, "other", 5.5, 7.5), (3, "wait_batch", 7.5, 8.0),
        (3, "other", 8.0, 9.5),
    ]  # fmt: skip
    assert timeline([{"step": 1, "time": 2.0, "main/reward/mean": 1.0}], ["main"]) is None


def test_a_gap_stays_a_gap() -> None:
    """A trainer that was away between two steps has no bar there."""
    found = timeline([step(1, 5.0, 2.0, train=2.0), step(2, 20.0, 3.0, train=3.0)], ["main"])
    assert found is not None
    assert [(b.start, b.end) for b in found.rows["main"]] == [(3.0, 5.0), (17.0, 20.0)]


def test_a_terminal_shows_the_waiting() -> None:
    """Half of the signs of the first ten seconds are those of waiting."""
    found = timeline(STEPS, ["main"])
    assert found is not None
    rollouts, main, key = as_text(found, width=47)  # 0.3 s a sign
    assert main.startswith("main      ") and rollouts.startswith("rollouts  ")
    signs = main.removeprefix("main      ")
    assert len(signs) == 47 and 24 <= signs.count("·") <= 28 and 12 <= signs.count("█") <= 14
    assert rollouts.removeprefix("rollouts  ")[:30] == "▅" * 30 and rollouts.endswith("█")
    assert "14 s" in key
