"""Which settings of verl can carry M-GRPO, and what `algorithm.mgrpo` says."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import mgrpo
from mgrpo.errors import ConfigError

NAME = "mgrpo"
"""Of the estimator, of the policy loss and of the settings below `algorithm`."""

Fold = Literal["token-mean", "sequence-mean", "sum"]
FOLDS: dict[str, Fold] = {
    "token-mean": "token-mean",
    "token-sum": "sum",
    "seq-mean-token-mean": "sequence-mean",
    "seq-mean-token-sum": "sequence-mean",
    "seq-mean-token-sum-norm": "sequence-mean",
}
"""What verl divides by in each loss_agg_mode: tokens, rows, or nothing."""

_ADDS_UP_BY = {"sapo": "seq-mean-token-mean"}
"""Losses of verl that do not look at loss_agg_mode, with the mode that they have."""

_NO_VOTES = {
    "geo_mean": "it divides by the rows of each micro-batch",
    "clip_cov": "it picks tokens by their advantage, which carries the vote",
    "kl_cov": "it picks tokens by their advantage, which carries the vote",
    "dro": "its quadratic term has no advantage to carry the vote",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """`algorithm.mgrpo` of verl's config: the arguments of mgrpo.assign."""

    d_max: int | dict[str, int]
    """Trajectories that each rollout contributes to an agent's groups: of every sub-agent, or of each by its role."""

    seed: int = 0
    """Of the draw where a rollout has more than d_max."""

    mode: Literal["weights", "duplicate", "expected", "none"] = "weights"
    """As mgrpo.align."""

    estimator: str = "grpo"
    """As mgrpo.group_advantage. algorithm.norm_adv_by_std_in_grpo=False makes grpo dr_grpo."""

    unbiased: bool = False
    """Divide by the sample deviation, as verl's own grpo does."""

    eps: float = 1e-6
    """Added to the deviation."""

    group_size: int | None = None
    """Rollouts that every group must have. None: groups may differ, and one that is smaller is logged."""

    unweighted_terms: bool = False
    """Accept that verl counts every row once, whatever its vote, in its KL and entropy terms."""

    fold: Fold = "token-mean"
    """What verl divides its loss by; read from loss_agg_mode."""


def settings_of(algorithm: Any) -> Settings:
    """From `config.algorithm` as verl hands it to an estimator. Raises ConfigError naming the setting."""
    given = None if algorithm is None else algorithm.get(NAME, None)
    if given is None:
        raise ConfigError(
            "algorithm.mgrpo: missing, and adv_estimator=mgrpo needs d_max; add +algorithm.mgrpo.d_max=4"
        )
    values = {str(name): _plain(value) for name, value in given.items()}
    mode = values.pop("loss_agg_mode", None)
    known = [field.name for field in fields(Settings) if field.name != "fold"]
    for name in values:
        if name not in known:
            raise ConfigError(f"algorithm.mgrpo.{name}: unknown, expected {', '.join(known)}")
    if values.get("d_max") is None:
        raise ConfigError("algorithm.mgrpo.d_max: missing; add +algorithm.mgrpo.d_max=4")
    if not algorithm.get("norm_adv_by_std_in_grpo", True):
        if values.get("estimator", "dr_grpo") not in ("dr_grpo", "rloo"):
            raise ConfigError(
                f"algorithm.norm_adv_by_std_in_grpo: False contradicts algorithm.mgrpo.estimator="
                f"{values['estimator']}, which divides by the deviation; set it to dr_grpo"
            )
        values.setdefault("estimator", "dr_grpo")
    actor = _actor(algorithm)
    values["fold"] = FOLDS["token-mean"] if mode is None and actor is None else fold_of(actor, mode)
    settings = Settings(**values)
    try:  # a step of one row: every argument is looked at
        size = settings.group_size or 1
        assign(settings, ["q"] * size, ["main"] * size, list(range(size)), [0] * size, [0.0] * size)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"algorithm.mgrpo: {error}") from error
    return settings


def assign(
    settings: Settings,
    query: Sequence[str],
    role: Sequence[str],
    rollout: Sequence[int],
    invocation: Sequence[int],
    reward: Sequence[float],
    **arguments: Any,
) -> mgrpo.Assigned:
    """mgrpo.assign of these rows under verl's settings; the votes stay apart from the advantages. Two steps of the same
    queries draw the same, whatever process they run in."""
    return mgrpo.assign(
        query, role, rollout, invocation, reward, d_max=settings.d_max, seed=settings.seed,
        step=zlib.crc32("\n".join(sorted(set(query))).encode()), mode=settings.mode, estimator=settings.estimator,
        unbiased=settings.unbiased, eps=settings.eps, group_size=settings.group_size, **arguments,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """A node of omegaconf as Python's own."""
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _actor(algorithm: Any) -> Any:
    """The actor's settings of the config that `algorithm` is a part of; None for one that stands alone."""
    root = getattr(algorithm, "_get_root", lambda: None)()  # omegaconf has no public name for it
    return None if root is None or root is algorithm else root.get("actor_rollout_ref", {}).get("actor")


def fold_of(actor: Any, mode: str | None = None) -> Fold:
    """What verl divides by. mode: given where there is no actor config. Raises ConfigError for what is no mode."""
    if actor is not None:
        loss = actor.policy_loss.loss_mode
        mode = _ADDS_UP_BY.get(loss, actor.loss_agg_mode)
    if mode not in FOLDS:
        raise ConfigError(f"loss_agg_mode: {mode!r} is unknown, expected {', '.join(FOLDS)}")
    return FOLDS[mode]


def check_config(config: Any) -> None:
    """Refuse what verl's config asks for and cannot be honoured: ConfigError naming setting, value and what to set
    instead. A config that uses nothing of mgrpo passes."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    if actor.policy_loss.loss_mode == NAME:
        check_actor(actor)
    if algorithm.adv_estimator != NAME:
        return
    settings = settings_of(algorithm)
    loss = actor.policy_loss.loss_mode
    if loss in _NO_VOTES:
        why = _NO_VOTES[loss]
        raise ConfigError(f"actor.policy_loss.loss_mode: {loss!r} cannot carry votes, {why}; set it to mgrpo")
    _check_scale(actor)
    if algorithm.get("use_kl_in_reward", False):
        raise ConfigError(
            "algorithm.use_kl_in_reward: True changes the rewards that groups are compared by; set it to False and "
            "actor.use_kl_loss=True"
        )
    if not settings.unweighted_terms:
        for name, default in (("use_kl_loss", False), ("entropy_coeff", 0)):
            if actor.get(name, default) != default:
                raise ConfigError(
                    f"actor.{name}: {actor.get(name)!r}, a term in which verl counts every row once, whatever its "
                    f"vote; set it to {default}, or accept that with +algorithm.mgrpo.unweighted_terms=True"
                )


def _check_scale(actor: Any) -> None:
    if actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.get("loss_scale_factor") is None:
        raise ConfigError(
            "actor.loss_scale_factor: None with loss_agg_mode=seq-mean-token-sum-norm divides by the width of the "
            "micro-batch, whatever that is; set it to data.max_response_length"
        )


def check_actor(actor: Any) -> None:
    """Refuse what the registered policy loss cannot compute, as check_config does."""
    _check_scale(actor)
    cap, high = float(actor.get("clip_ratio_c", 3.0)), _high(actor)
    if cap < 1 + high:
        raise ConfigError(
            f"actor.clip_ratio_c: {cap} is below 1 + clip_ratio_high, {1 + high}; set it to {1 + high} or more"
        )


def _high(actor: Any) -> float:
    high = actor.get("clip_ratio_high")
    return float(actor.clip_ratio if high is None else high)


def loss_settings(actor: Any, mode: str) -> dict[str, Any]:
    """Arguments of GrpoLossConfig that compute what verl's settings ask for, by verl's loss_agg_mode."""
    low, cap = actor.get("clip_ratio_low"), float(actor.get("clip_ratio_c", 3.0))
    settings: dict[str, Any] = {
        "clip_eps_low": float(actor.clip_ratio if low is None else low),
        "clip_eps_high": _high(actor),
        "delta": cap if cap < 1e30 else None,
    }
    if mode in ("token-mean", "token-sum"):
        return settings | {"type": "dapo"}
    if mode == "seq-mean-token-mean":
        return settings | {"type": "grpo"}
    norm = mode == "seq-mean-token-sum-norm"
    return settings | {"type": "dr_grpo", "max_completion_length": actor.loss_scale_factor if norm else 1}
