"""docs/tasks.md: its blocks are files of one folder that load, name their task and pass their own test."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mgrpo.config import load_config
from mgrpo.environments.loader import BUILT_IN, load_task
from mgrpo.run.processes import load_run_task
from tests.runs import ROOT
from tests.test_chat import CHATML, tokenizer

PAGE = (ROOT / "docs" / "tasks.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files, and a tokenizer where it expects one."""
    for kind, name, text in re.findall(r"```(python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        assert name.endswith({"python": ".py", "toml": ".toml"}[kind])
        (tmp_path / name).write_text(text)
    tokenizer(CHATML).save_pretrained(tmp_path / "models" / "smollm2")
    return tmp_path


def test_every_block_is_a_file(folder: Path) -> None:
    """No block of the page is left out."""
    assert PAGE.count("```") == 2 * len(list(folder.glob("*.*")))


def test_its_test_passes(folder: Path) -> None:
    """As a reader runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_sums.py"],
        cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_its_run_finds_its_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file, and by the module that the entry point names; its rewards fit its scores, its splits do not meet."""
    config = load_config(folder / "run.toml")
    task = load_run_task(config)
    assert task.roles == ("main",) and task.chat
    assert task.question(7, 1) == task.question(7, 1) != task.question(8, 1)
    kept = [
        {q.text.split()[2] for q in task.questions(split, 500)}
        for split in ("train", "validation", "heldout")
    ]
    assert not kept[0] & kept[1] and not kept[1] & kept[2] and not kept[0] & kept[2]
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    monkeypatch.syspath_prepend(folder)
    name = project["entry-points"]["mgrpo.tasks"]["sums"]
    named = load_config(folder / "run.toml", [f'task={{name="{name}"}}'])
    assert type(load_task(named.task, named.roles)).__name__ == "Sums"
    sys.modules.pop("sums")


def test_it_names_the_built_in_tasks() -> None:
    """The page's table lists what the loader knows."""
    assert all(f"`{name}`" in PAGE for name in BUILT_IN)
