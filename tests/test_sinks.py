"""Metric sinks: each gets what metrics.jsonl gets, a resumed run goes on in the same place, and none can end a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from mgrpo.errors import ConfigError
from mgrpo.metrics import MetricsWriter, read_metrics
from mgrpo.sinks.base import MetricSink, RunInfo
from mgrpo.sinks.registry import find_sinks, open_sinks
from tests.runs import RELAY, command, started

VALUES = {"main/reward/mean": 0.5, "sub/policy/kl": float("inf")}


class Library(ModuleType):
    """Stands for wandb, mlflow or trackio: every call is written down."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.info = SimpleNamespace(run_id="id of the run")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **named: Any) -> Library:
            self.calls.append((name, arguments, named))
            return self

        return call

    def called(self, name: str) -> list[tuple[Any, dict[str, Any]]]:
        return [(arguments, named) for n, arguments, named in self.calls if n == name]


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def info(folder: Path) -> RunInfo:
    return RunInfo(folder, "team", "run-7", {"seed": 1})


def write(folder: Path, name: str) -> list[str]:
    """One record through the writer, as the launcher does; what it reports."""
    said: list[str] = []
    sinks = open_sinks([name], info(folder), said.append)
    with MetricsWriter(folder, said.append, sinks) as writer:
        writer.write(3, 1.0, VALUES)
    return said


@pytest.mark.parametrize("library", ["wandb"], indirect=True)
def test_wandb_has_the_steps_as_its_axis_and_goes_on_in_one_run(library: Library, tmp_path: Path) -> None:
    """Agents report their steps in any order, which W&B's own counter would refuse."""
    assert write(tmp_path, "wandb") == write(tmp_path, "wandb") == []
    (_, first), (_, second) = library.called("init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("team", "run-7", {"seed": 1})
    assert (("*",), {"step_metric": "step"}) in library.called("define_metric")
    assert library.called("log") == [(({**VALUES, "step": 3},), {})] * 2
    assert len(library.called("finish")) == 2


@pytest.mark.parametrize("library", ["mlflow"], indirect=True)
def test_mlflow_gets_finite_numbers_and_goes_on_in_one_run(library: Library, tmp_path: Path) -> None:
    assert write(tmp_path, "mlflow") == write(tmp_path, "mlflow") == []
    runs = [named["run_id"] for _, named in library.called("start_run")]
    assert runs == [None, "id of the run"]
    assert library.called("log_metrics") == [(({"main/reward/mean": 0.5},), {"step": 3})] * 2
    assert library.called("set_experiment")[0] == (("team",), {})
    assert len(library.called("log_dict")) == 1 and len(library.called("end_run")) == 2


@pytest.mark.parametrize("library", ["trackio"], indirect=True)
def test_trackio_goes_on_under_the_runs_name(library: Library, tmp_path: Path) -> None:
    assert write(tmp_path, "trackio") == []
    ((_, named),) = library.called("init")
    assert (named["project"], named["name"], named["resume"]) == ("team", "run-7", "allow")
    assert library.called("log") == [((VALUES,), {"step": 3})] and len(library.called("finish")) == 1


def test_tensorboard_may_fail_alone(tmp_path: Path) -> None:
    """Its folder cannot be made: metrics.jsonl is written all the same."""
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    said = write(tmp_path, "tensorboard")
    assert [record["step"] for record in read_metrics(tmp_path)] == [3]
    assert len(said) == 1 and "without tensorboard" in said[0]


@pytest.mark.parametrize(("name", "lines"), [("tensorboard", 0), ("wandb", 1)])
def test_a_library_that_is_not_installed_is_missed_where_it_was_asked_for(
    name: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensorboard is the default, which nobody asked for."""
    for module in (name, f"{name}.summary"):
        monkeypatch.setitem(sys.modules, module, None)
    said = write(tmp_path, name)
    assert len(said) == lines and all(f"without {name}" in line for line in said)


class Fragile(MetricSink):
    """A server that goes away after one write."""

    written: ClassVar[list[int]] = []

    def __init__(self, run: RunInfo) -> None:
        self.written.clear()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.written.append(step)
        if len(self.written) == 2:
            raise ConnectionError("the server went away")


def test_a_sink_that_fails_is_left_out_and_named_once(tmp_path: Path) -> None:
    """By import path; the records that follow reach metrics.jsonl alone."""
    name = f"{__name__}:Fragile"
    sys.modules.setdefault(__name__, sys.modules[Fragile.__module__])
    said: list[str] = []
    sinks = open_sinks([name], info(tmp_path), said.append)
    with MetricsWriter(tmp_path, said.append, sinks) as writer:
        for step in range(4):
            writer.write(step, float(step), VALUES)
    assert Fragile.written == [0, 1] and [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert said == [f"metrics go on without {name}: the server went away"]


def test_an_unknown_sink_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """Before a folder exists."""
    with pytest.raises(ConfigError, match=r"metrics\.sinks: 'wandb' stands there 2 times"):
        find_sinks(["wandb", "tensorboard", "wandb"])
    arguments = command("train", str(RELAY), "--out", str(tmp_path / "run"), '--set=metrics.sinks=["wandbb"]')
    with started(arguments) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and not (tmp_path / "run").exists()
    assert "metrics.sinks 'wandbb' is unknown, expected mlflow, tensorboard, trackio, wandb or" in output
