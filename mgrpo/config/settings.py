"""The base of every section of the config tree."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

MAX_SECONDS = 1e7  # of any deadline: four months; the waits of the system overflow further up


class Settings(BaseModel):
    """Base of every section: frozen, no unknown keys, docstrings as descriptions, and no number that is infinite or
    NaN: such a learning rate, weight or deadline is a mistake of whatever wrote the file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )
    renamed: ClassVar[Mapping[str, str]] = {}  # what a key was called -> what it is called

    @model_validator(mode="before")
    @classmethod
    def _no_old_names(cls, tree: object) -> object:
        for old, new in cls.renamed.items():
            if isinstance(tree, dict) and old in tree:
                raise ValueError(f"{old} is unknown: it is called {new}")
        return tree


def first_problem(error: ValidationError, *where: str, got: bool = True) -> str:
    """The first problem as `where.field: what was expected, got value`. got: say the value, where the message does not
    itself; False where it may be a secret."""
    first = error.errors()[0]
    field, message = ".".join(map(str, (*where, *first["loc"]))), first["msg"].removeprefix("Value error, ")
    said = not got or first["type"] in ("value_error", "missing")
    return f"{field}: {message}" + ("" if said else f", got {first['input']!r:.100}")


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    for name, number in _numbers(options):
        if not math.isfinite(number):
            raise ValueError(f"{name} should be a finite number, got {number}")
    try:
        json.dumps(options)  # as the run's own copy of its config is written
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected texts, numbers, lists and tables: {error}") from None
    return options


def _numbers(tree: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a tree of tables and lists, with its dotted name."""
    if isinstance(tree, float):
        yield name.removeprefix("."), tree
    elif isinstance(tree, dict):
        for key, part in tree.items():
            yield from _numbers(part, f"{name}.{key}")
    elif isinstance(tree, list):
        for number, part in enumerate(tree):
            yield from _numbers(part, f"{name}.{number}")


Options = Annotated[dict[str, Any], AfterValidator(_plain)]
"""Settings of a task, or of a class from outside: each checks its own."""
