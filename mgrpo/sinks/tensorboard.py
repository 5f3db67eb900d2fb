"""Event files in <run>/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping

from mgrpo.sinks.base import MetricSink, RunInfo


class TensorboardSink(MetricSink):
    """The library `tensorboard`; neither torch nor TensorFlow is loaded."""

    def __init__(self, run: RunInfo) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
