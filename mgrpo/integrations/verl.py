"""verl 0.9 trains an agent team: an estimator and a policy loss named `mgrpo`, found by verl through an entry point.

verl knows no weights: its loss is the sum over a mini-batch's rows, divided by their tokens or by their number. So the
estimator hands it advantages that carry the votes,

    A' = A w n / D        n rows (sequence modes) or tokens (token-mean) in the step, D the sum of w, or of w x tokens

and the policy term, which is homogeneous in the advantage, makes of that the weighted loss exactly. Where a step is cut
into several mini-batches, n and D are the step's.

Which agent a row is of: an agent loop writes `output.extra_fields["mgrpo"] = row(role, invocation, reward)` into each
of its outputs (verl's v1 trainers; a rollout is a session). A trainer of one's own names its rows:
`non_tensor_batch["uid"] = row_name(query, role, rollout, invocation)`.

Deviations: verl's rows of padding (no trained token) are no trajectories. A row's reward is its own where `row` has
one; else verl's, which writes the last output's reward over all outputs of a session. A group of one has advantage 0,
where verl has its reward.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

import mgrpo
from mgrpo.errors import ConfigError
from mgrpo.integrations.verl_settings import (
    NAME,
    Settings,
    assign,
    check_actor,
    check_config,
    loss_settings,
    settings_of,
)

_log = logging.getLogger(__name__)
_METRICS = (
    "clip_frac_low",
    "clip_frac_high",
    "ratio_min",
    "ratio_mean",
    "ratio_max",
    "ess",
    "nonfinite_rows",
)
_V1 = "verl.trainer.ppo.v1.utils"
_V1_USER = "verl.trainer.ppo.v1.trainer_base"
_FUNCTION = "compute_advantage_for_multi_trajectories"
_HOW = (
    'in a v1 trainer the agent loop writes output.extra_fields["mgrpo"] = mgrpo.integrations.verl.row(role, '
    'invocation); elsewhere non_tensor_batch["uid"] = [mgrpo.integrations.verl.row_name(query, role, rollout, '
    "invocation), ...]"
)


def row_name(query: str | int, role: str, rollout: int, invocation: int) -> str:
    """The uid of a row: which trajectory it is. ValueError for a role that is empty or has a "/" in it."""
    if not role or "/" in role:
        raise ValueError(f"role: {role!r} is empty or has a '/' in it")
    if rollout < 0 or invocation < 0:
        raise ValueError(f"rollout {rollout}, invocation {invocation}: neither may be below 0")
    return f"{NAME}/{query}/{role}/{rollout}/{invocation}"


def row(role: str, invocation: int = 0, reward: float | None = None) -> dict[str, Any]:
    """What an output of an agent loop says of itself: whose trajectory it is, which invocation of that role in this
    rollout (0..d_k - 1), and its own reward if it is not the session's. ValueError as row_name's."""
    row_name("", role, 0, invocation)
    return {"role": role, "invocation": int(invocation), "reward": None if reward is None else float(reward)}


def _parts(uid: object) -> tuple[str, str, int, int]:
    """(query, role, rollout, invocation) of a row's uid; ConfigError for any other uid."""
    start, *fields = str(uid).rsplit("/", 3)
    head, slash, query = start.partition("/")
    if head == NAME and slash and len(fields) == 3 and fields[1].isdecimal() and fields[2].isdecimal():
        return query, fields[0], int(fields[1]), int(fields[2])
    raise ConfigError(f"uid {str(uid)!r} names no role, and adv_estimator=mgrpo needs one: {_HOW}")


def advantages(
    token_level_rewards: Any, response_mask: Any, index: Any = None, config: Any = None, **_: Any
) -> tuple[Any, Any]:
    """The estimator: advantages (and the same as returns) of the rows, with their votes in them.

    token_level_rewards, response_mask (B, S); index (B,): uids as row_name writes them; config: verl's
    `config.algorithm`. Returns float32 (B, S) twice, 0 outside the mask. ConfigError for settings that cannot be
    honoured and uids without a role, ValueError for wrong groups, as mgrpo.assign.
    """
    settings = settings_of(config)
    if index is None:
        raise ConfigError(f"uid: missing, and adv_estimator=mgrpo needs one: {_HOW}")
    reward = token_level_rewards.sum(-1).double().cpu().numpy()
    tokens = (response_mask != 0).sum(-1).cpu().numpy()
    real = [at for at, uid in enumerate(index) if tokens[at] or not _is_padding(uid)]
    rows = [_parts(index[at]) for at in real]
    value = _folded(settings, rows, reward[real], tokens, real)
    out = response_mask.new_tensor(value, dtype=token_level_rewards.dtype).unsqueeze(-1) * response_mask
    return out, out


def _is_padding(uid: object) -> bool:
    """verl fills a step up to a multiple of its mini-batch with rows named pad<32 hex digits>, which train nothing."""
    text = str(uid)
    return text.startswith("pad") and len(text) == 35


def _folded(
    settings: Settings,
    rows: Sequence[tuple[str, str, int, int]],
    reward: Any,
    tokens: Any,
    real: Sequence[int],
) -> Any:
    """(B,) advantages with votes; reward: of the rows; tokens: of all B, of which `real` are rows."""
    out = np.zeros(len(tokens))
    if not rows:
        return out
    query, role, rollout, invocation = (list(column) for column in zip(*rows, strict=True))
    _report_sizes(settings, query, role, rollout)
    own = tokens[real]
    assigned = assign(settings, query, role, rollout, invocation, reward, tokens=own)
    factor = 1.0
    if settings.fold == "sequence-mean":
        factor = len(tokens) / assigned.denominator
    elif settings.fold == "token-mean":
        factor = float(tokens.sum()) / assigned.weighted_tokens if assigned.weighted_tokens else 0.0
    out[real] = assigned.advantage * assigned.weight * factor
    return out


def _report_sizes(
    settings: Settings, query: Sequence[str], role: Sequence[str], rollout: Sequence[int]
) -> None:
    """Log the queries that have fewer rollouts than others. (With group_size they are refused.)"""
    if settings.group_size is not None:
        return
    members: dict[str, set[int]] = defaultdict(set)
    for name, number in zip(query, rollout, strict=True):
        members[name].add(number)
    largest = max(len(found) for found in members.values())
    short = {name: len(found) for name, found in members.items() if len(found) < largest}
    if short:
        name, size = next(iter(short.items()))
        _log.warning(
            "%d of %d queries have fewer than %d rollouts, e.g. %r %d; +algorithm.mgrpo.group_size=%d refuses them",
            *(len(short), len(members), largest, name, size, largest),
        )


def policy_loss(
    old_log_prob: Any,
    log_prob: Any,
    advantages: Any,
    response_mask: Any,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Any = None,
) -> tuple[Any, dict[str, float]]:
    """The policy loss of a micro-batch under verl's signature: mgrpo.policy_loss with the settings of the actor's
    config (clip_ratio_low/high, clip_ratio_c as `delta`, loss_scale_factor); (B, S) throughout.

    A token whose log-prob is not finite contributes nothing and is counted in "actor/nonfinite_rows". The means among
    the metrics are over tokens with an advantage. ConfigError as check_config.
    """
    torch: Any = importlib.import_module("torch")
    check_actor(config)
    whole = dict(config.global_batch_info)  # of the mini-batch over all ranks
    ranks = whole.get("dp_size") or 1
    settings = loss_settings(config, loss_agg_mode)
    if loss_agg_mode == "token-mean":
        denominator = whole.get("batch_num_tokens") or response_mask.sum()
    elif loss_agg_mode == "token-sum":
        denominator = 1
    else:
        denominator = whole.get("global_batch_size") or (response_mask.sum(-1) > 0).sum()
        denominator = denominator * settings.get("max_completion_length", 1)
    loss, metrics = mgrpo.policy_loss(
        log_prob,
        config=mgrpo.GrpoLossConfig(**settings),
        token_advantages=advantages,
        loss_mask=response_mask,
        old_logprobs=old_log_prob,
        token_weight=rollout_is_weights,
        denominator=denominator / ranks,  # verl averages the gradient over its ranks
    )
    numbers = torch.stack(
        [metrics[name].detach().float() for name in _METRICS]
    ).tolist()  # one wait for the device
    found = {f"actor/{name}": value for name, value in zip(_METRICS, numbers, strict=True)}
    return loss, found | {"actor/pg_clipfrac": found["actor/clip_frac_low"] + found["actor/clip_frac_high"]}


def register() -> None:
    """Make `mgrpo` known to verl in this process: algorithm.adv_estimator=mgrpo, actor.policy_loss.loss_mode=mgrpo,
    verl's validate_config, which then refuses settings that cannot be honoured, and patch_compute_advantage.

    verl calls it by itself, through an entry point, wherever it is imported; calling it again changes nothing.
    """
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    core.register_adv_est(NAME)(advantages)
    core.register_policy_loss(NAME)(policy_loss)
    settings: Any = importlib.import_module("verl.utils.config")
    if not hasattr(settings.validate_config, "of_mgrpo"):
        settings.validate_config = _then_check(settings.validate_config)
    if _V1 in sys.modules:
        patch_compute_advantage()
    elif not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(
            0, _PatchOnImport()
        )  # importing it here would cost every process of verl seconds


def _then_check(validate: Callable[..., None]) -> Callable[..., None]:
    """verl's validate_config, which main_ppo calls before it starts anything, and ours after it."""

    @functools.wraps(validate)
    def both(config: Any, *arguments: Any, **named: Any) -> None:
        validate(config, *arguments, **named)
        check_config(config)

    both.of_mgrpo = True  # type: ignore[attr-defined]
    return both


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches verl's v1 module when somebody imports it."""

    busy = False

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _V1 or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_patch(module: ModuleType) -> None:
                run(module)
                _patch(module)

            spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def patch_compute_advantage() -> None:
    """In verl's v1 trainers, which hand an estimator neither role nor session: with adv_estimator=mgrpo take them from
    the rows' keys and from what the agent loop wrote. Other estimators run as before. `register` does it."""
    _patch(importlib.import_module(_V1))


def _patch(module: ModuleType) -> None:
    original = getattr(module, _FUNCTION)
    if not hasattr(original, "of_mgrpo"):
        setattr(module, _FUNCTION, _by_role(original))
    user = sys.modules.get(_V1_USER)
    if user is not None and hasattr(user, _FUNCTION):
        setattr(user, _FUNCTION, getattr(module, _FUNCTION))


def _by_role(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute(data: Any, batch_keys: list[str], adv_estimator: Any, *rest: Any, **named: Any) -> Any:
        if adv_estimator == NAME:
            _name_rows(data, batch_keys)
        return original(data, batch_keys, adv_estimator, *rest, **named)

    compute.of_mgrpo = True  # type: ignore[attr-defined]
    return compute


def _name_rows(data: Any, batch_keys: Sequence[str]) -> None:
    """uids as row_name writes them, and rows' own rewards, in the DataProto of a v1 step, whose keys are
    {uid}_{session}_{output}."""
    queue = importlib.import_module("transfer_queue")
    stored = queue.kv_batch_get(keys=list(batch_keys), partition_id="train", select_fields=["extra_fields"])
    written = stored["extra_fields"].tolist()
    names: list[str] = []
    for at, (key, extra) in enumerate(zip(batch_keys, written, strict=True)):
        uid, session, output = key.rsplit("_", 2)
        if _is_padding(uid):
            names.append(uid)
            continue
        own = extra.get(NAME) if isinstance(extra, dict) else None
        if not own:
            raise ConfigError(f"output {output} of session {session} of uid {uid!r} names no role: {_HOW}")
        names.append(row_name(uid, own["role"], int(session), own["invocation"]))
        if own.get("reward") is not None:
            rewards = data.batch["token_level_rewards"]
            rewards[at] = 0.0
            rewards[at, -1] = own["reward"]
    data.non_tensor_batch["uid"] = np.array(names, dtype=object)


def check(config: Any = None) -> None:
    """Whether verl in this environment carries mgrpo, and a run with this config could: raises ConfigError with what is
    wrong, e.g. the error of a plugin that verl passed over in silence.

    config: verl's, as hydra composed it; None: only the installation.
    """
    try:
        importlib.import_module("verl")
        core = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise ConfigError(f"verl cannot be imported: {error}; pip install verl==0.9.1") from error
    if core.ADV_ESTIMATOR_REGISTRY.get(NAME) is not advantages:
        raise ConfigError(f"verl has not loaded mgrpo's plugin: {_why_not_loaded()}")
    if config is not None:
        check_config(config)


def _why_not_loaded() -> str:
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if policy.strip().lower() != "auto" and NAME not in [name.strip() for name in policy.lower().split(",")]:
        return f"VERL_USE_EXTERNAL_PLUGINS is {policy!r}; add mgrpo to it, or leave it unset"
    points = [point for point in importlib.metadata.entry_points(group="verl.plugins") if point.name == NAME]
    if not points:
        return "the installation of mgrpo has no entry point verl.plugins; install mgrpo with pip"
    try:
        points[0].load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it loads now, and did not when verl was imported"


__all__ = [
    "advantages",
    "check",
    "check_config",
    "patch_compute_advantage",
    "policy_loss",
    "register",
    "row",
    "row_name",
]
