"""Trackio: a local dashboard, or a Space (TRACKIO_* variables)."""

from __future__ import annotations

from collections.abc import Mapping

from mgrpo.sinks.base import MetricSink, RunInfo


class TrackioSink(MetricSink):
    """A resumed run goes on under its name."""

    def __init__(self, run: RunInfo) -> None:
        import trackio

        self._run = trackio.init(project=run.project, name=run.name, resume="allow", config=dict(run.config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
