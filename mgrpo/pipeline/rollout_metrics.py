"""What a worker reports of one rollout batch: speed, failures by kind, and the task's own numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mgrpo.environments.failure import KINDS
from mgrpo.pipeline.play import RolloutResult


@dataclass(slots=True)
class RolloutMetrics:
    """Counts over the results of a batch."""

    tokens: int = 0  # sampled
    mismatches: int = 0  # turns with a retokenization mismatch
    failed: Counter[str] = field(default_factory=Counter)  # by kind
    failure: str = ""  # the reason of the last that failed
    values: dict[str, list[float]] = field(default_factory=dict)  # of the task, by name

    def take(self, result: RolloutResult) -> None:
        """Count one result."""
        self.mismatches += result.mismatches
        if result.kind is not None:
            self.failed[result.kind] += 1
            self.failure = result.failure
        self.tokens += sum(int(t.loss_mask.sum()) for t in result.trajectories())
        for name, values in result.metrics().items():
            self.values.setdefault(name, []).extend(values)

    def report(self, seconds: float) -> dict[str, float]:
        """Name -> value; seconds: what the batch took. The task's numbers are means over those who reported one."""
        return {
            "rollout/perf/tok_per_s": self.tokens / seconds,
            "rollout/time/batch": seconds,
            "rollout/retokenization_mismatch": self.mismatches,
            "rollout/failed": self.failed.total(),
            **{f"rollout/failed_by_{kind}": self.failed[kind] for kind in KINDS},
            **{name: sum(values) / len(values) for name, values in sorted(self.values.items())},
        }
