"""Finding a task: by a built-in name, an installed package's name, an import path, or a file."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from mgrpo.config import config_digest, dump_config, load_config
from mgrpo.config.task import TaskConfig
from mgrpo.environments.loader import load_task
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError
from mgrpo.pipeline.play import play
from mgrpo.tasks.atlas.task import AtlasTask
from tests.play_kit import REQUEST, SlowEngine, team

RUN = """
[task]
{task}
[agents.main]
reward = {{ correct = 1.0 }}
[agents.sub]
reward = {{ outcome = 1.0 }}
"""
TASK = """
from mgrpo.tasks.atlas.task import AtlasTask

class MyTask(AtlasTask):
    pass
"""
PAIR = ("main", "sub")


def written(folder: Path, task: str, source: str = TASK, file: str = "my_task.py") -> Path:
    """A run's TOML in `folder` beside a task's file."""
    (folder / file).write_text(source)
    path = folder / "run.toml"
    path.write_text(RUN.format(task=task))
    return path


def test_tasks_are_found_by_name() -> None:
    """Built-in names and package.module:Class load; anything else says what was expected."""
    assert isinstance(load_task(TaskConfig(name="atlas"), PAIR), AtlasTask)
    assert isinstance(load_task(TaskConfig(), PAIR), AtlasTask)
    assert isinstance(load_task(TaskConfig(name="mgrpo.tasks.atlas.task:AtlasTask"), PAIR), Task)
    for name, words in {
        "atlsa": "expected atlas, atlas-chat",
        "no.such.module:Task": "module 'no' is not installed",
        "mgrpo.types:Trajectory": "has no Task class",
        "mgrpo.tasks.atlas.task:Nothing": "has no Task class",
        "my_task.py:MyTask": r"is a file; name it by task\.path",
        "": "is unknown",
    }.items():
        with pytest.raises(ConfigError, match=rf"task\.name.*{words}"):
            load_task(TaskConfig(name=name), PAIR)


def test_an_installed_package_gives_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of the group mgrpo.tasks, in a distribution on the path."""
    (tmp_path / "loader_sample.py").write_text(TASK)
    info = tmp_path / "loader_sample-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loader-sample\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mgrpo.tasks]\nsample = loader_sample:MyTask\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_task(TaskConfig(name="sample"), PAIR)).__name__ == "MyTask"
    with pytest.raises(ConfigError, match=r"expected atlas, .*, research, sample or 'package\.module:Class'"):
        load_task(TaskConfig(name="smaple"), PAIR)
    sys.modules.pop("loader_sample")


def test_a_file_is_found_from_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """task.path is relative to the TOML, wherever a process runs, and stays findable from the kept config.json; where
    the folder lies is no part of what the run computes, the file's name and class are."""
    config = load_config(written(tmp_path, 'path = "my_task.py:MyTask"'))
    kept = tmp_path / "run" / "config.json"
    kept.parent.mkdir()
    dump_config(config, kept)
    monkeypatch.chdir("/")
    again = load_config(kept)
    assert again == config and config.task.path == f"{tmp_path}/my_task.py:MyTask"
    assert type(load_task(again.task, PAIR)).__name__ == "MyTask"
    (tmp_path / "moved").mkdir()
    moved = load_config(written(tmp_path / "moved", 'path = "my_task.py:MyTask"'))
    assert moved != config and config_digest(moved) == config_digest(config)
    other = load_config(tmp_path / "run.toml", ["task.path=my_task.py:Other"])
    assert config_digest(other) != config_digest(config)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ('name = "atlas"\npath = "my_task.py:MyTask"', "task: name='atlas' and path='.*' exclude each other"),
        ('path = "my_task.py"', "expected a file and its class, e.g. 'my_task.py:MyTask'"),
        ('path = "my_task:MyTask"', "expected a file and its class"),
        ("path = 3", "task.path: Input should be a valid string, got 3"),
    ],
)
def test_a_place_that_is_none_is_refused(tmp_path: Path, task: str, words: str) -> None:
    """Two places, or half of one: the config says which."""
    with pytest.raises(ConfigError, match=words):
        load_config(written(tmp_path, task))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere_at_all\n", r"No module named 'nowhere_at_all' \(.*my_task\.py:1\)"),
        ("\nx = 1 / 0\n", r"ZeroDivisionError: division by zero \(.*my_task\.py:2\)"),
        ("class MyTask(:\n", r"SyntaxError: .*\(.*my_task\.py:1\)"),
        ("raise SystemExit(3)\n", r"SystemExit: 3 \(.*my_task\.py:1\)"),
        ("class MyTask: pass\n", r"my_task\.py has no Task class 'MyTask'"),
        ("", r"my_task\.py has no Task class 'MyTask'"),
        ("from mgrpo.environments.task import Task\nclass MyTask(Task): roles = ('main',)\n", "abstract"),
        (
            TASK + "    def __init__(self, *_): raise ValueError('unwell')\n",
            r"task 'my_task\.py:MyTask': unwell$",
        ),
        (
            TASK + "    def __init__(self, *_): {}['a']\n",
            r"task 'my_task\.py:MyTask': KeyError: 'a' \(.*my_task.py:6\)",
        ),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, source: str, words: str) -> None:
    """A file that raises on import, or has no such Task: one line that says where."""
    config = load_config(written(tmp_path, 'path = "my_task.py:MyTask"', source))
    with pytest.raises(ConfigError, match=words) as error:
        load_task(config.task, PAIR)
    assert "\n" not in str(error.value)


def test_a_failure_in_a_file_is_placed_in_it(tmp_path: Path) -> None:
    """What its play() raises fails the rollout with file and line, as a package's does."""
    source = TASK + "    async def play(self, question, episode):\n        raise KeyError('shelf')\n"
    task = load_task(load_config(written(tmp_path, 'path = "my_task.py:MyTask"', source)).task, PAIR)
    result = asyncio.run(play(task, REQUEST, team(SlowEngine()), 1))
    assert result.kind == "task" and f"'shelf' ({tmp_path}/my_task.py:7, in play)" in result.failure


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """By its absolute path."""
    config = load_config(written(tmp_path, 'path = "elsewhere/my_task.py:MyTask"'))
    with pytest.raises(ConfigError, match=rf"task\.path {tmp_path}/elsewhere/my_task\.py: no such file"):
        load_task(config.task, PAIR)


def test_a_broken_installed_module_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file is: an error on import never passes as a name that is unknown."""
    (tmp_path / "broken_sample.py").write_text("x = {}['a']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"task\.name 'broken_sample:A'.*KeyError.*broken_sample\.py:1\)"):
        load_task(TaskConfig(name="broken_sample:A"), PAIR)
