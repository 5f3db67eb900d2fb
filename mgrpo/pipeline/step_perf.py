"""How fast a step was, on two clocks: the seconds of its training, and those of the whole step with its waits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mgrpo.pipeline.batch import StepBatch
from mgrpo.trainers.base import StepCost
from mgrpo.trainers.batch import MicroBatch

GB = 1e9


def step_perf(
    cost: StepCost | None, batches: Sequence[StepBatch], train: float, step: float
) -> dict[str, float]:
    """Metrics of a step that trained for `train` seconds and took `step` seconds in all. batches: of all roles that
    act with the policy. What is not known of the cost, as the peak of an unknown device, has no metric."""
    tokens = sum(batch.metrics.get("tokens", 0.0) for batch in batches)
    trained = sum(
        trained_tokens(micro) for batch in batches for part in batch.minibatches for micro in part.micro
    )
    entering = sum(
        entering_tokens(micro) for batch in batches for part in batch.minibatches for micro in part.micro
    )
    shared = sum(plan.shared_tokens for batch in batches for plan in batch.plans)
    found = {"perf/shared_tokens": float(shared), "perf/shared": shared / max(entering, 1)}
    for clock, seconds in (("", max(train, 1e-9)), ("_wall", max(step, 1e-9))):
        found[f"perf/tok_per_s{clock}"] = tokens / seconds
        found[f"perf/trained_tok_per_s{clock}"] = trained / seconds
        if cost is not None and cost.peak_flops > 0:
            found[f"perf/mfu{clock}"] = cost.flops / seconds / cost.peak_flops
    if cost is not None:
        found["perf/tflops"] = cost.flops / max(train, 1e-9) / 1e12
        found["perf/peak_mem_gb"] = cost.peak_memory / GB
    return {name: value for name, value in found.items() if math.isfinite(value)}


def entering_tokens(micro: MicroBatch) -> int:
    """Tokens of its rows that enter the model, shared or not: no row's last one does."""
    return int((micro.lengths - 1).clamp(min=1).sum())


def trained_tokens(micro: MicroBatch) -> int:
    """Sampled tokens with an advantage other than 0."""
    advantages = micro.advantages[:, None] if micro.token_advantages is None else micro.token_advantages
    return int(((advantages != 0) & micro.loss_mask).sum())
