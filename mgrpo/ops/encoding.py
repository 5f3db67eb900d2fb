"""A loss config as the list of numbers that a registered op can take, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

from mgrpo.config.loss import Correction, Estimator, GrpoLossConfig, KlEstimator, LossType, RatioLevel

_FIELDS: dict[str, tuple[str, ...]] = {  # fields that are names: their values, in a fixed order
    "loss_type": get_args(LossType),
    "ratio_level": get_args(RatioLevel),
    "kl_estimator": get_args(KlEstimator),
    "correction": get_args(Correction),
    "estimator": get_args(Estimator),
}
_ABSENT = -1.0


def encode(config: GrpoLossConfig) -> list[float]:
    """A config as the numbers an op can take, in the order of its fields."""
    return [
        _number(config.loss_type, "loss_type"),
        _number(config.ratio_level, "ratio_level"),
        config.clip_eps_low,
        config.clip_eps_high,
        _ABSENT if config.delta is None else config.delta,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
        config.kl_coef,
        _number(config.kl_estimator, "kl_estimator"),
        config.entropy_coef,
        config.temperature,
        _number(config.correction, "correction"),
        _ABSENT if config.correction_low is None else config.correction_low,
        _ABSENT if config.correction_high is None else config.correction_high,
        _ABSENT if config.veto is None else config.veto,
        _ABSENT if config.max_completion_length is None else float(config.max_completion_length),
        _number(config.estimator, "estimator"),
        config.advantage_eps,
    ]


def decode(settings: list[float]) -> GrpoLossConfig:
    """The config `encode` was given."""
    return _decode(tuple(settings))


@lru_cache(maxsize=256)
def _decode(settings: tuple[float, ...]) -> GrpoLossConfig:
    values: dict[str, object] = {}
    for name, number in zip(GrpoLossConfig.model_fields, settings, strict=True):
        if name in _FIELDS:
            values[name] = _FIELDS[name][int(number)]
        elif number != _ABSENT:
            values[name] = int(number) if name == "max_completion_length" else number
    return GrpoLossConfig.model_validate(values)


def _number(value: str, field: str) -> float:
    return float(_FIELDS[field].index(value))
