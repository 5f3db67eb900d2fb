"""From a run's [task] to a Task: built-in, of an installed package, on the path, or in a file.

Its class is called with (options, roles): the run's [task.options] table and the run's roles, "main" first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgrpo.config.task import TaskConfig
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError
from mgrpo.plugins import errors_named, find_class

BUILT_IN = {
    "atlas": "mgrpo.tasks.atlas.task:AtlasTask",
    "atlas-chat": "mgrpo.tasks.atlas.chat:AtlasChatTask",
    "factbook": "mgrpo.tasks.factbook.task:FactbookTask",
    "factbook-small": "mgrpo.tasks.factbook.small.task:SmallTask",
    "harness": "mgrpo.gateway.harness:HarnessTask",
    "research": "mgrpo.tasks.research.task:ResearchTask",
}
GROUP = "mgrpo.tasks"


def load_task(config: TaskConfig, roles: Sequence[str]) -> Task:
    """The task of a config; its module is imported only now. Raises ConfigError naming what is wrong, and where the
    task's own code raised."""
    return load_tasks(config, roles, {"": config.options})[0]


def load_tasks(
    config: TaskConfig, roles: Sequence[str], options: Mapping[str, Mapping[str, object]]
) -> list[Task]:
    """One task of the config's class for each of `options`, which stand here by what their errors begin with. Raises
    ConfigError as load_task does."""
    found, made = _find(config), []
    for where, given in options.items():
        with errors_named(f"{where}task {config.label!r}"):
            try:
                made.append(found(dict(given), tuple(roles)))
            except (ValueError, TypeError) as error:  # a refusal
                raise ConfigError(f"{where}task {config.label!r}: {error}") from error
    return made


def _find(config: TaskConfig) -> type[Task]:
    if config.path is not None:
        file, _, name = config.path.rpartition(":")
        return _class_in(Path(file), name)
    name = str(config.name)
    if ".py:" in name:
        raise ConfigError(f"task.name {name!r} is a file; name it by task.path")
    return find_class("task.name", name, BUILT_IN, GROUP, Task)  # type: ignore[type-abstract]


def _class_in(file: Path, name: str) -> type[Task]:
    """The Task class `name` of a file, which is a module of its own: it may import what is installed, not its
    neighbours."""
    where = f"task.path {file}"
    if not file.is_file():
        raise ConfigError(f"{where}: no such file")
    spec = importlib.util.spec_from_file_location(f"mgrpo_task_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "it ends with .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up there
    with errors_named(where):
        spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"{where} has no Task class {name!r}")
    return found
