"""What a worker reports of its rollouts: who is dropped, and how full it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.pipeline.play import RolloutResult
from mgrpo.pipeline.rollout_metrics import Load, RolloutMetrics
from tests.play_kit import REQUEST


def result(calls: int, seconds: float, late: bool) -> RolloutResult:
    return RolloutResult(
        REQUEST, 0, None, "late" if late else "", "deadline" if late else None, calls=calls, seconds=seconds
    )


def test_who_is_dropped_is_reported() -> None:
    """The share of failed rollouts among those with as many calls, and among those that took as long; buckets without
    a rollout are left out."""
    metrics = RolloutMetrics()
    for calls, seconds, late in (
        (0, 0.5, False),
        (0, 1.0, True),
        (3, 1.1, True),
        (4, 4000.0, False),
        (17, 20.0, True),
    ):
        metrics.take(result(calls, seconds, late))
    report = metrics.report(2.0)
    assert {
        name.removeprefix("rollout/drop/by_"): rate for name, rate in report.items() if "/drop/" in name
    } == {
        "calls_0": 0.5,
        "calls_3_4": 0.5,
        "calls_more": 1.0,
        "duration_1s": 0.5,
        "duration_4s": 1.0,
        "duration_64s": 1.0,
        "duration_more": 0.0,
    }
    assert report["rollout/failed_by_deadline"] == report["rollout/failed"] == 3


def test_load_is_a_mean_over_time() -> None:
    """Two places: both taken for 2 s, one for 1 s, none for 1 s; then a new span begins."""
    load = Load(2, 10.0)
    load.change(2, 10.0)
    load.change(-1, 12.0)
    load.change(-1, 13.0)
    load.queue(3)
    load.queue(0)
    assert load.report(14.0) == {
        "rollout/perf/busy": 5 / 8,
        "rollout/perf/in_flight": 5 / 4,
        "rollout/perf/queue": 1.5,
    }
    load.change(1, 15.0)
    assert load.report(16.0)["rollout/perf/busy"] == 0.25


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_slow_tool_calls_are_not_hidden_by_a_mean(seconds: list[float]) -> None:
    """Median and 95th percentile of a tool's seconds over all rollouts, failed ones included, as numpy computes them;
    no other number has them."""
    metrics = RolloutMetrics()
    for number, value in enumerate(seconds):
        tools = {"rollout/tool/search/seconds": [value], "rollout/tool/search/calls": [1.0]}
        metrics.take(replace(result(0, 1.0, number % 2 == 1), tools=tools))
    report = metrics.report(1.0)
    for word, share in (("median", 50), ("p95", 95)):
        wanted = np.percentile(seconds, share, method="inverted_cdf")
        assert report[f"rollout/tool/search/seconds_{word}"] == wanted
    assert {name for name in report if name.startswith("rollout/tool/search/calls")} == {
        "rollout/tool/search/calls"
    }
