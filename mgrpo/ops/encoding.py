"""The names of a loss config as numbers: one table for each setting that is a name, for the kernels of both fast
backends; and the settings of a built-in loss as the list of numbers that a registered op can take, and back.

A name that a table does not hold is an error: nothing is computed as something else. The number of a loss type is its
`fused_id` (mgrpo/losses/builtin.py).
"""

from __future__ import annotations

from functools import lru_cache

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.losses.base import PolicyLoss
from mgrpo.losses.builtin import KINDS
from mgrpo.losses.registry import find_loss

CODES: dict[str, dict[str, int]] = {
    "ratio_level": {"auto": 0, "token": 1, "sequence": 2},
    "kl_estimator": {"k1": 1, "k2": 2, "k3": 3},
    # what a row of logits knows alone; the corrections of whole sequences are in policy_weight, or take two phases
    "correction": {"none": 0, "token_tis": 1, "mis": 2, "sequence_mask": 0, "geometric": 0},
    "estimator": {"grpo": 0, "dr_grpo": 1, "rloo": 2, "batch": 3},
}
"""Setting -> its names -> the number by which the kernels know each."""

_NAMES = {"type": list(KINDS), **{field: list(codes) for field, codes in CODES.items()}}
_FIELDS = tuple(name for name in GrpoLossConfig.model_fields if name != "options")
_ABSENT = -1.0


def code(field: str, name: str) -> int:
    """The number by which the kernels know the value `name` of a setting. ValueError for a name they do not know."""
    check_name(field, name)
    return CODES[field][name]


def term_code(loss: PolicyLoss) -> int:
    """The number by which the kernels know the loss's term. ValueError for one they do not know."""
    if loss.config.kl_bias_correction:
        raise ValueError("kl_bias_correction: the kernels do not know the KL times the ratio")
    if not loss.fused or loss.fused_id is None:
        raise ValueError(f"type: the kernels do not know the term of {loss.config.type!r}")
    return loss.fused_id


def check_name(field: str, name: str) -> None:
    """ValueError that lists the names the setting `field` may have, unless `name` is one."""
    if name not in _NAMES[field]:
        raise ValueError(f"{field}: {name!r} is not one of {', '.join(_NAMES[field])}")


def check_names(config: GrpoLossConfig) -> None:
    """`check_name` for every setting of a config that is a name: one made by `model_construct` was never validated."""
    for field in CODES:
        check_name(field, getattr(config, field))


def encode(config: GrpoLossConfig) -> list[float]:
    """The config of a built-in loss as the numbers an op can take, in the order of its fields."""
    return [_number(name, getattr(config, name)) for name in _FIELDS]


def decode(settings: list[float]) -> PolicyLoss:
    """The loss whose config `encode` was given."""
    return _decode(tuple(settings))


@lru_cache(maxsize=256)
def _decode(settings: tuple[float, ...]) -> PolicyLoss:
    values: dict[str, object] = {}
    for name, number in zip(_FIELDS, settings, strict=True):
        if name in _NAMES:
            values[name] = _NAMES[name][int(number)]
        elif number != _ABSENT:
            values[name] = int(number) if name == "max_completion_length" else number
    return find_loss(GrpoLossConfig.model_validate(values))


def _number(field: str, value: str | float | None) -> float:
    if value is None:
        return _ABSENT
    if isinstance(value, str):
        check_name(field, value)
        return float(_NAMES[field].index(value))
    return float(value)
