"""`mgrpo init-task`: the package that it writes passes its own test and trains, from its file and installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgrpo.cli.scaffold import init_task
from mgrpo.errors import ConfigError
from mgrpo.view.data import RunView
from tests.browser import MISSING, browser
from tests.runs import ROOT, final_weights, records, summary, train
from tests.test_cli import mgrpo, refused
from tests.test_view import served

SHORT = (
    "trainer.steps=3",
    "eval.validation=8",
    "eval.heldout=8",
    *(f"agents.{role}.sft.steps=20" for role in ("main", "helper")),
)
ENTRY = "[mgrpo.tasks]\nbig_digits = big_digits.task:BigDigitsTask\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh package, written by the command."""
    folder = tmp_path_factory.mktemp("init") / "package"
    done = mgrpo("init-task", "big_digits", "--out", str(folder))
    assert done.returncode == 0 and f"pip install -e {folder}" in done.stdout, done.stderr
    return folder


@pytest.fixture(scope="module")
def by_path(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with the task in its file."""
    out = tmp_path_factory.mktemp("runs") / "path"
    train(package / "run.toml", out, *SHORT, 'task={path="big_digits/task.py:BigDigitsTask"}')
    return out


def test_its_own_test_passes_and_nothing_of_the_template_is_left(package: Path) -> None:
    """As a user runs it, in the package's folder; names are the user's everywhere."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=package, env=os.environ | {"PYTHONPATH": f"{package}:{ROOT}"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr
    files = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) == 6
    for file in files:
        assert "my_task" not in file.read_text() + str(file) and "MyTask" not in file.read_text()
    assert ENTRY.splitlines()[1].split(" = ")[1] in (package / "pyproject.toml").read_text()


def test_it_trains_from_its_file_and_reports_its_metric(by_path: Path) -> None:
    """The task's own number is in metrics.jsonl, tensorboard and the page's series, named by the task alone."""
    assert summary(by_path)["finished"] and summary(by_path)["valid"] and summary(by_path)["steps"] == 3
    name = "rollout/task/helper_followed"
    values = [r[name] for r in records(by_path) if name in r]
    assert len(values) == 3 and all(0 <= value <= 1 for value in values)
    assert any(name.encode() in p.read_bytes() for p in (by_path / "tensorboard").iterdir())
    assert [point[1] for point in RunView(by_path).overview()["series"][name]] == values


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
def test_the_page_draws_its_metric(by_path: Path, tmp_path: Path) -> None:
    """A chart of its own, among those that every run has."""
    with served(by_path) as (url, _), browser(tmp_path) as page:
        page.open(url)
        title = "helper_followed (reported by the task)"
        page.until("return document.querySelector(`[data-chart='${arguments[0]}'] circle`) !== null", title)
        assert page.problems() == []


def test_it_trains_installed_to_the_same_bits(
    package: Path, by_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name that its entry point gives; how a task is found changes nothing of what it computes."""
    info = tmp_path / "site" / "big_digits-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: big_digits\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    monkeypatch.setenv("PYTHONPATH", f"{package}:{info.parent}")
    train(package / "run.toml", tmp_path / "run", *SHORT)
    assert final_weights(tmp_path / "run") == final_weights(by_path)


@pytest.mark.parametrize(
    "name", ["", "My", "a-b", "1a", "../up", "class", "json", "atlas", "mgrpo", "a" * 41]
)
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything is written."""
    with pytest.raises(ConfigError, match=r"task name '.*': expected a small letter"):
        init_task(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    """Even an empty one."""
    assert "exists; choose another --out" in refused(mgrpo("init-task", "digits", "--out", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
