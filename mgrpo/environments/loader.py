"""Task plug-ins: what the agents are asked, which tools they have, how they are scored.

A task is named by its short name (`atlas`) or, for a user's own, by `package.module:Class`. Its class is
called with (options, roles): the run's [task.options] table and the run's roles, "main" first. It refuses
what it cannot serve with ValueError.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError

_BUILT_IN = {
    "atlas": "mgrpo.tasks.atlas.task:AtlasTask",
    "atlas-chat": "mgrpo.tasks.atlas.chat:AtlasChatTask",
}


def load_task(name: str, options: Mapping[str, object], roles: Sequence[str]) -> Task:
    """The task `name`; its module is imported only now. Raises ConfigError naming what is wrong."""
    module_name, _, class_name = _BUILT_IN.get(name, name).partition(":")
    if not module_name or not class_name:
        raise ConfigError(
            f"task.name {name!r} is unknown, expected {', '.join(_BUILT_IN)} or 'package.module:Class'"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise ConfigError(f"task.name {name!r}: module {error.name!r} is not installed") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task.name {name!r}: {module_name} has no Task class {class_name!r}")
    try:
        return found(options, tuple(roles))  # type: ignore[call-arg]  # see the module's docstring
    except (ValueError, TypeError) as error:
        raise ConfigError(f"task {name!r}: {error}") from error
