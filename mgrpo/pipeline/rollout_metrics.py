"""What a worker reports of its rollouts: speed, failures by kind, who is dropped, and the task's own numbers."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from mgrpo.environments.failure import KINDS
from mgrpo.pipeline.play import RolloutResult

CALLS = {0: "0", 1: "1", 2: "2", 4: "3_4", 8: "5_8", 16: "9_16"}  # most calls -> name of the bucket
DURATIONS = {1: "1s", 4: "4s", 16: "16s", 64: "64s", 256: "256s", 1024: "1024s"}  # most seconds -> name
QUANTILES = {"median": 0.5, "p95": 0.95}  # of a tool's seconds
SAMPLED = "rollout/tokens/"  # the metric of each role: its sampled tokens
MORE = "more"  # name of the bucket beyond the last


@dataclass(slots=True)
class DropRate:
    """How many of the rollouts of each bucket failed: dropping the long ones biases what is trained on, so it must be
    seen."""

    name: str
    buckets: dict[int, str]  # upper bound -> name, in order
    rollouts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def take(self, value: float, failed: bool) -> None:
        at = bisect_left(list(self.buckets), value)
        bucket = [*self.buckets.values(), MORE][at]
        self.rollouts[bucket] += 1
        self.failed[bucket] += failed

    def report(self) -> dict[str, float]:
        """Share of the failed in each bucket that has a rollout."""
        return {
            f"rollout/drop/by_{self.name}_{bucket}": self.failed[bucket] / self.rollouts[bucket]
            for bucket in (*self.buckets.values(), MORE)
            if self.rollouts[bucket]
        }


@dataclass(slots=True)
class RolloutMetrics:
    """Counts over the results of a batch, or of a span of time."""

    tokens: Counter[str] = field(default_factory=Counter)  # sampled, by role
    mismatches: int = 0  # turns with a retokenization mismatch
    seconds: float = 0.0  # that the rollouts took, summed
    failed: Counter[str] = field(default_factory=Counter)  # by kind
    failure: str = ""  # the reason of the last that failed
    values: dict[str, list[float]] = field(default_factory=dict)  # of the task, by name
    drop: tuple[DropRate, DropRate] = field(
        default_factory=lambda: (DropRate("calls", CALLS), DropRate("duration", DURATIONS))
    )

    def take(self, result: RolloutResult) -> None:
        """Count one result."""
        self.mismatches += result.mismatches
        self.seconds += result.seconds
        if result.kind is not None:
            self.failed[result.kind] += 1
            self.failure = result.failure
        for rate, value in zip(self.drop, (result.calls, result.seconds), strict=True):
            rate.take(value, result.kind is not None)
        for trajectory in result.trajectories():
            self.tokens[trajectory.role] += int(trajectory.loss_mask.sum())
        for name, values in result.metrics().items():
            self.values.setdefault(name, []).extend(values)

    def report(self, seconds: float) -> dict[str, float]:
        """Name -> value; seconds: the time in which the results came. The task's numbers are means over those who
        reported one."""
        calls, duration = self.drop
        return {
            "rollout/perf/tok_per_s": self.tokens.total() / seconds,
            **{f"{SAMPLED}{role}": count for role, count in sorted(self.tokens.items())},
            "rollout/retokenization_mismatch": self.mismatches,
            "rollout/failed": self.failed.total(),
            **{f"rollout/failed_by_{kind}": self.failed[kind] for kind in KINDS},
            **calls.report(),
            **duration.report(),
            **{name: sum(values) / len(values) for name, values in sorted(self.values.items())},
            **self._of_tools(),
        }

    def _of_tools(self) -> dict[str, float]:
        """Median and 95th percentile of the seconds of each tool's calls, by nearest rank: a mean hides the few slow
        calls that rollouts wait for."""
        found: dict[str, float] = {}
        for name, values in self.values.items():
            if name.startswith("rollout/tool/") and name.endswith("/seconds"):
                ranked = sorted(values)
                for word, share in QUANTILES.items():
                    found[f"{name}_{word}"] = ranked[math.ceil(share * len(ranked)) - 1]
        return found


@dataclass(slots=True)
class Load:
    """How full one worker is, over time: rollouts in flight and requests that wait in its engines. No clock: `now` is
    an argument, in seconds."""

    concurrency: int
    since: float  # beginning of the span
    in_flight: int = 0
    _changed_at: float = 0.0
    _rollout_seconds: float = 0.0
    _queues: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed_at = self.since

    def change(self, by: int, now: float) -> None:
        """So many more (fewer) rollouts are in flight."""
        self._rollout_seconds += self.in_flight * (now - self._changed_at)
        self._changed_at = now
        self.in_flight += by

    def queue(self, waiting: int) -> None:
        """So many requests wait in the engines; called at equal intervals."""
        self._queues.append(waiting)

    def report(self, now: float) -> dict[str, float]:
        """Of the span that ends now; the next begins. busy: share of the places that were taken."""
        self.change(0, now)
        mean = self._rollout_seconds / max(now - self.since, 1e-9)
        queue = sum(self._queues) / len(self._queues) if self._queues else 0.0
        self.since, self._rollout_seconds = now, 0.0
        self._queues.clear()
        return {
            "rollout/perf/busy": mean / self.concurrency,
            "rollout/perf/in_flight": mean,
            "rollout/perf/queue": queue,
        }
