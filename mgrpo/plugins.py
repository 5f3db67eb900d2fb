"""Finding a class by the name that a config gives it: a built-in name, an installed package's, or an import path.

Each seam (tasks, algorithms, losses, engines, trainers) has a table of its built-in classes and a base class. A package
adds a name with an entry point in the seam's group, e.g. `mgrpo.tasks`; a module on the path needs none:
"package.module:Class".
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from mgrpo.errors import ConfigError

T = TypeVar("T")


def find_class(where: str, name: str, built_in: Mapping[str, str], group: str, base: type[T]) -> type[T]:
    """The class `name` of a seam; its module is imported only now.

    where: the config's field, for errors. built_in: name -> "module:Class". group: of the entry points. Raises
    ConfigError naming the field, and what names there are, for a name that is unknown, a module that is not installed
    or fails to load, and a class that is not derived from `base`.
    """
    installed = {point.name: point for point in entry_points(group=group)}
    target = built_in.get(name) or (installed[name].value if name in installed else name)
    module_name, colon, class_name = target.partition(":")
    if not (module_name and colon and class_name):
        raise ConfigError(f"{where} {name!r} is unknown, expected {known_names(built_in, installed)}")
    with errors_named(f"{where} {name!r}"):
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{where} {name!r}: module {error.name!r} is not installed") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{where} {name!r}: {module_name} has no {base.__name__} class {class_name!r}")
    return found


def known_names(built_in: Mapping[str, str], installed: Mapping[str, EntryPoint]) -> str:
    """What a name may be, for errors."""
    return f"{', '.join(sorted({*built_in, *installed}))} or 'package.module:Class'"


@contextmanager
def errors_named(where: str) -> Iterator[None]:
    """Turn what code from outside raises, while it is imported or made, into a ConfigError that names file and line."""
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {type(error).__name__}: {error} ({_place(error)})") from error


def _place(error: BaseException) -> str:
    """file:line of the innermost line that raised; of a syntax error the line that cannot be read."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"
