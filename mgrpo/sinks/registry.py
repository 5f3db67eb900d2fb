"""The metric sinks by name. A new one: a file beside these and a line here, or a class in a package of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mgrpo.errors import ConfigError
from mgrpo.plugins import find_class
from mgrpo.sinks.base import MetricSink, RunInfo

BUILT_IN = {
    "tensorboard": "mgrpo.sinks.tensorboard:TensorboardSink",
    "wandb": "mgrpo.sinks.wandb:WandbSink",
    "mlflow": "mgrpo.sinks.mlflow:MlflowSink",
    "trackio": "mgrpo.sinks.trackio:TrackioSink",
}
GROUP = "mgrpo.sinks"


def find_sinks(names: Sequence[str]) -> list[type[MetricSink]]:
    """The classes that metrics.sinks names. Raises ConfigError for a name that is not known or stands there twice."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"metrics.sinks: {name!r} stands there {names.count(name)} times")
    return [
        find_class("metrics.sinks", name, BUILT_IN, GROUP, MetricSink)  # type: ignore[type-abstract]
        for name in names
    ]


def open_sinks(names: Sequence[str], run: RunInfo, report: Callable[[str], None]) -> dict[str, MetricSink]:
    """Name -> sink. One that cannot be opened is left out and reported in one line; tensorboard, which is the default,
    without a word where its library is not installed."""
    sinks: dict[str, MetricSink] = {}
    for name, kind in zip(names, find_sinks(names), strict=True):
        try:
            sinks[name] = kind(run)
        except Exception as error:  # of a library, a server or a file system that is not ours
            if name != "tensorboard" or not isinstance(error, ImportError):
                report(f"metrics go on without {name}: {error}")
    return sinks
