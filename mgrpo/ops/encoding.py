"""The names of a loss config as numbers: one table for each setting that is a name, for the kernels of both fast
backends; and a whole config as the list of numbers that a registered op can take, and back.

A name that a table does not hold is an error, and so is a table that misses a name the config knows: nothing is
computed as something else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

from mgrpo.config.loss import Correction, Estimator, GrpoLossConfig, KlEstimator, LossType, RatioLevel

_NAMES: dict[str, tuple[str, ...]] = {  # fields that are names: their values, in a fixed order
    "loss_type": get_args(LossType),
    "ratio_level": get_args(RatioLevel),
    "kl_estimator": get_args(KlEstimator),
    "correction": get_args(Correction),
    "estimator": get_args(Estimator),
}
_FIELDS = tuple(GrpoLossConfig.model_fields)
_ABSENT = -1.0


def _table(field: str, codes: dict[str, int]) -> dict[str, int]:
    if set(codes) != set(_NAMES[field]):
        raise TypeError(f"{field}: the kernels know {sorted(codes)}, the config {sorted(_NAMES[field])}")
    return codes


_CODES: dict[str, dict[str, int]] = {
    # shapes of the token loss: clipped, cispo, sapo (LossType in csrc/loss_rows.hpp, constants of kernels/grpo_loss.py)
    "loss_type": _table(
        "loss_type", {"grpo": 0, "bnpo": 0, "dr_grpo": 0, "dapo": 0, "gspo": 0, "cispo": 1, "sapo": 2}
    ),
    "kl_estimator": _table("kl_estimator", {"k1": 1, "k2": 2, "k3": 3}),
    # what a row of logits knows alone; the corrections of whole sequences are in policy_weight, or take two phases
    "correction": _table(
        "correction", {"none": 0, "token_tis": 1, "mis": 2, "sequence_mask": 0, "geometric": 0}
    ),
    "estimator": _table("estimator", {"grpo": 0, "dr_grpo": 1, "rloo": 2, "batch": 3}),
}


def code(field: str, name: str) -> int:
    """The number by which the kernels know the value `name` of a setting: loss_type, kl_estimator, correction or
    estimator. ValueError for a name they do not know."""
    check_name(field, name)
    return _CODES[field][name]


def check_name(field: str, name: str) -> None:
    """ValueError that lists the names the setting `field` may have, unless `name` is one."""
    if name not in _NAMES[field]:
        raise ValueError(f"{field}: {name!r} is not one of {', '.join(_NAMES[field])}")


def check_names(config: GrpoLossConfig) -> None:
    """`check_name` for every setting of a config that is a name: one made by `model_construct` was never validated."""
    for field in _NAMES:
        check_name(field, getattr(config, field))


def encode(config: GrpoLossConfig) -> list[float]:
    """A config as the numbers an op can take, in the order of its fields."""
    return [_number(name, getattr(config, name)) for name in _FIELDS]


def decode(settings: list[float]) -> GrpoLossConfig:
    """The config `encode` was given."""
    return _decode(tuple(settings))


@lru_cache(maxsize=256)
def _decode(settings: tuple[float, ...]) -> GrpoLossConfig:
    values: dict[str, object] = {}
    for name, number in zip(_FIELDS, settings, strict=True):
        if name in _NAMES:
            values[name] = _NAMES[name][int(number)]
        elif number != _ABSENT:
            values[name] = int(number) if name == "max_completion_length" else number
    return GrpoLossConfig.model_validate(values)


def _number(field: str, value: str | float | None) -> float:
    if value is None:
        return _ABSENT
    if isinstance(value, str):
        check_name(field, value)
        return float(_NAMES[field].index(value))
    return float(value)
