"""The losses by name: built-in (builtin.py), an installed package's (entry points), or "package.module:Class"."""

from __future__ import annotations

from functools import lru_cache
from inspect import Parameter, signature
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from mgrpo.config.loss import LOSS_GROUP, GrpoLossConfig
from mgrpo.errors import ConfigError
from mgrpo.losses.base import PolicyLoss
from mgrpo.losses.builtin import KINDS
from mgrpo.plugins import find_class

BUILT_IN = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in KINDS.items()}


def find_loss(config: GrpoLossConfig, where: str = "loss") -> PolicyLoss:
    """The loss that `config` names, with its options. where: of the config, for errors.

    Raises ConfigError for a type that is unknown, cannot be imported or is no PolicyLoss, and for options that its
    constructor does not take, misses, or refuses with a ValueError.
    """
    kind = KINDS.get(config.type)
    if kind is not None:
        return kind(config)
    kind = _find(f"{where}.type", config.type)
    options = _options(kind, config.options, f"{where}.options")
    try:
        return kind(config, **options)
    except ValueError as error:
        raise ConfigError(f"{where}.options: {error}") from error


@lru_cache(maxsize=64)
def _find(where: str, name: str) -> type[PolicyLoss]:
    return find_class(where, name, BUILT_IN, LOSS_GROUP, PolicyLoss)  # type: ignore[type-abstract]


def _options(kind: type[PolicyLoss], given: dict[str, Any], where: str) -> dict[str, Any]:
    """Options checked against the names and types of the constructor's arguments."""
    hints = get_type_hints(kind.__init__)
    taken = [p for p in signature(kind).parameters.values() if p.name != "config"]
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is Parameter.empty else p.default) for p in taken
    }
    model = create_model(
        "Options", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields
    )
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        names = ", ".join(fields) or "none"
        raise ConfigError(
            f"{where}.{'.'.join(map(str, first['loc']))}: {first['msg']}; {kind.__name__} takes: {names}"
        ) from None
    return {name: getattr(checked, name) for name in given}
