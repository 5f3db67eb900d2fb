"""Weights & Biases. Account, server and offline mode are the library's own settings (WANDB_* variables)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from mgrpo.sinks.base import MetricSink, RunInfo


class WandbSink(MetricSink):
    """A resumed run goes on in the same W&B run, whose id stands in <run>/wandb-id."""

    def __init__(self, run: RunInfo) -> None:
        import wandb

        kept = run.folder / "wandb-id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=kept.read_text(),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
        )
        # W&B's own step only grows, and ours does not: the metric "step" is the x axis of all others.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()
