"""MLflow. The tracking server is the library's own setting (MLFLOW_TRACKING_URI)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mgrpo.sinks.base import MetricSink, RunInfo


class MlflowSink(MetricSink):
    """The project is an experiment. A resumed run goes on in the same MLflow run; its id is in <run>/mlflow-id."""

    def __init__(self, run: RunInfo) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(run.project)
        kept = run.folder / "mlflow-id"
        known = kept.read_text() if kept.exists() else None
        started = mlflow.start_run(run_id=known, run_name=run.name)
        if known is None:
            kept.write_text(started.info.run_id)
            mlflow.log_dict(dict(run.config), "config.json")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()
