"""The losses from logits: group statistics, token loss and the gradient over the vocabulary.

The formula and its deviations are in token_loss.py; the advantages are group_advantage.py's, weighted by the
alignment weights (duplicates count in the statistics as in the loss).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.losses.base import PolicyLoss
from mgrpo.losses.registry import find_loss
from mgrpo.ops import check, encoding
from mgrpo.ops.backend import choose
from mgrpo.ops.group_advantage import group_advantage
from mgrpo.ops.padded import as_packed
from mgrpo.ops.selective_logprob import compute_dtype, row_logprob
from mgrpo.ops.token_loss import (
    Groups,
    Tokens,
    active_tokens,
    correction_weight,
    loss_denominator,
    name_metrics,
    needs_two_phases,
    token_loss,
)
from mgrpo.ops.token_values import TokenValues, token_values


class LossInputs(TypedDict, total=False):
    """The arguments of a loss about the tokens of N trajectories, beside the logits and the ids of the tokens. Packed
    they are T in a row; padded, B = N rows of S of which the mask tells the tokens.

    Exactly one source of advantages: `advantages`, `token_advantages`, or `rewards` with `group_id`.
    """

    cu_seqlens: Tensor | None
    """int32 or int64 (N+1,), delimits packed trajectories; None for padded ones."""
    advantages: Tensor | None
    """(N,), one for each trajectory, or (T,) | (B, S); where N = T they are the trajectories'."""
    token_advantages: Tensor | None
    """(T,) | (B, S), one for each token. Not with a sequence-level ratio, whose gradient has one advantage a
    trajectory."""
    rewards: Tensor | None
    """(N,), of whole groups, from which the advantages are made."""
    group_id: Tensor | None
    """int32 or int64 (N,), with rewards."""
    seq_weight: Tensor | None
    """(N,), the alignment weight of each trajectory; None: 1."""
    token_weight: Tensor | None
    """(T,) | (B, S), a factor on each token's policy, KL and entropy terms, without a gradient; it does not change what
    the token counts as. None: 1."""
    old_logprobs: Tensor | None
    """(T,) | (B, S) in nats; without it the policy is its own old policy (ratio 1)."""
    ref_logprobs: Tensor | None
    """(T,) | (B, S) in nats, under the reference policy."""
    rollout_logprobs: Tensor | None
    """(T,) | (B, S) in nats, as the sampler reported them. NaN or infinite where it reported none: no correction at
    this token, which is counted in the metric rollout_missing_rows."""
    loss_mask: Tensor | None
    """(T,) | (B, S), non-zero where the token was sampled by this policy; None: everywhere. A value other than 0 and 1
    is a factor on the token's terms and what the token counts as in lengths and denominators (sum of loss_mask)."""
    denominator: Tensor | float | None
    """What the weighted sum is divided by; None: this batch's own (`loss_denominator`). Pass the whole minibatch's
    when a batch is a micro-batch, and losses and gradients simply add up. 0: the loss is 0, and so are its
    gradients."""


@overload
def grpo_loss(
    logits: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    inplace: bool = False,
    impl: str = "auto",
    tokens: Literal[False] = False,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def grpo_loss(
    logits: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    inplace: bool = False,
    impl: str = "auto",
    tokens: Literal[True],
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor], TokenValues]: ...


def grpo_loss(
    logits: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    inplace: bool = False,
    impl: str = "auto",
    tokens: bool = False,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], TokenValues]:
    """(loss 0-d, metrics) of the tokens of N trajectories; a row of `logits` scores the target id at its place.

    Packed: logits (T, V), target_ids int64 (T,), and cu_seqlens. Padded: logits (B, S, V), target_ids (B, S). inputs:
    the keyword arguments of `LossInputs`, of which a source of advantages is needed. A target id is in [0, V), or -100
    where the loss_mask is 0. config: which loss, and its settings.

    inplace: the gradient overwrites `logits` (its values are lost to every other reader).

    tokens: return a third value, `TokenValues`, and the metric "entropy_all" beside "entropy": the mean over all rows
    under the mask beside that over active rows. Rows that cannot move the gradient are then computed too, where they
    are under the mask; loss, gradient and the other metrics stay as they are.

    Returns the loss in float32 (float64 for float64 logits), differentiable in `logits`, and METRICS as 0-d
    tensors on the same device; for a built-in loss nothing here synchronises with it. Raises TypeError/ValueError
    naming the argument and the bound, and ConfigError for a loss that cannot be found. torch.autocast changes nothing.
    """
    three = isinstance(logits, Tensor) and logits.dim() == 3
    check.floating("logits", logits, (None, None, None) if three else (None, None), logits)
    check.ids(target_ids, logits.shape[:-1], logits.shape[-1], logits, inputs.get("loss_mask"))
    backend = choose(impl, logits.device, logits.dtype)
    loss = known_loss(config)
    two_phases = needs_two_phases(loss, inputs.get("old_logprobs") is not None)
    fuse_groups = backend == "triton" and not two_phases and not tokens
    known = prepare(logits, target_ids, loss, backend, inputs, fuse_groups=fuse_groups)
    z = logits.flatten(0, -2)
    if backend == "reference":
        logp, entropy = row_logprob(z, known.target_ids, config.temperature)
        value, metrics = token_loss(logp, entropy, known, loss)
    else:
        z = z.contiguous()
        # before the gradient may overwrite the logits
        more = _other_rows(z, known, loss, backend) if tokens else None
        value, metrics, logp, entropy = _fast(z, known, loss, inplace, two_phases, backend)
        if more is not None:
            rest, *found = more
            logp, entropy = (torch.where(rest, a, b) for a, b in zip(found, (logp, entropy), strict=True))
    if not tokens:
        return value, metrics
    values, mean = token_values(logp, entropy, known, loss, target_ids.shape)
    return value, metrics | mean, values


def _other_rows(z: Tensor, known: Tokens, loss: PolicyLoss, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, logp, entropy) of the rows (bool, (T,)) under the mask that the loss leaves out."""
    from mgrpo.ops import library

    rest = known.mask & ~known.active(loss)
    with torch.no_grad():
        out = library.row_logprob(z, known.target_ids, rest, loss.config.temperature, False, backend)
    return rest, out[0], out[1]


def _fast(
    z: Tensor, known: Tokens, loss: PolicyLoss, inplace: bool, two_phases: bool, backend: str
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """(loss, metrics, logp, entropy) of logits z (T, V); the last two of active rows."""
    from mgrpo.ops import library

    need_grad = torch.is_grad_enabled() and z.requires_grad
    if two_phases:
        active, temperature = known.active(loss), loss.config.temperature
        logp, entropy, *_ = library.row_logprob(z, known.target_ids, active, temperature, inplace, backend)
        return *token_loss(logp, entropy, known, loss), logp, entropy
    settings = encoding.encode(loss.config)
    if inplace and need_grad and not torch.compiler.is_compiling():  # a compiler plans its own memory
        value, metrics, logp, entropy = library.InPlace.apply(  # type: ignore[no-untyped-call]
            z, known, settings, backend
        )
    else:
        value, metrics, logp, entropy, _ = library.grpo_loss(
            z, *library.flatten(known), settings, need_grad, backend
        )
    return value, name_metrics(metrics), logp, entropy


def known_loss(config: GrpoLossConfig) -> PolicyLoss:
    """The loss of a config whose settings all have a name that the backends know."""
    if not isinstance(config, GrpoLossConfig):
        raise TypeError(f"config: expected GrpoLossConfig, got {type(config).__name__}")
    encoding.check_names(config)
    return find_loss(config, "config")


def prepare(
    like: Tensor,
    target_ids: Tensor,
    loss: PolicyLoss,
    impl: str,
    inputs: LossInputs,
    *,
    fuse_groups: bool = False,
) -> Tokens:
    """Check the arguments of a loss call, packed or padded (target_ids (B, S)), and fold mask, weights, normaliser and
    what is known of the correction.

    fuse_groups: leave rewards to the kernel, which reduces each row's group itself (`advantages` are then 1).
    """
    unknown = sorted(set(inputs) - set(LossInputs.__annotations__))
    if unknown:
        raise TypeError(f"{unknown[0]}: unknown argument")
    target_ids, inputs = as_packed(target_ids, inputs)
    config, cu_seqlens, loss_mask = loss.config, inputs["cu_seqlens"], inputs.get("loss_mask")
    seq_weight, denominator = inputs.get("seq_weight"), inputs.get("denominator")
    assert cu_seqlens is not None
    rows, n = target_ids.shape[0], max(cu_seqlens.numel() - 1, 0)
    check.cu_seqlens(cu_seqlens, rows, like)
    check.mask(loss_mask, (rows,), like)
    check.weights("seq_weight", seq_weight, n, like)
    _check_sources(inputs, loss)
    if loss_mask is None:
        mask = torch.ones_like(target_ids, dtype=torch.bool)
    else:
        mask = loss_mask if loss_mask.dtype == torch.bool else loss_mask != 0
    target_ids, (old, ref, rollout) = _logprobs(target_ids, mask, loss, inputs, like)
    dtype = compute_dtype(like)
    places = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    # All borders, less one: torch 2.11's compiler searches a slice of them from its storage's beginning.
    seq_id = torch.searchsorted(cu_seqlens.contiguous(), places, right=True) - 1
    groups = None
    rewards, group_id = inputs.get("rewards"), inputs.get("group_id")
    if fuse_groups and rewards is not None and group_id is not None:
        _check_rewards(rewards, group_id, n, like)
        choose(impl, rewards.device, rewards.dtype)  # the kernel takes no more than group_advantage would
        groups = Groups(rewards, group_id.contiguous(), seq_weight)
        advantages = torch.ones_like(target_ids, dtype=dtype)
    else:
        advantages = _advantages(like, seq_id, n, inputs, config, impl)
    value = None if loss_mask is None or loss_mask.dtype == torch.bool else loss_mask
    factor = inputs.get("token_weight")
    check.token_weight(factor, mask, like)
    if factor is not None and not check.values_visible(factor):  # as one whose log-probs are not finite
        target_ids = _spoil(target_ids, mask, factor)
    row_weight = _row_weight(loss, cu_seqlens, loss_mask, seq_weight, denominator, like)
    if row_weight.dim():
        if value is None and factor is None:
            row_weight = row_weight.to(dtype)
        row_weight = row_weight[seq_id]
    elif value is not None or factor is not None:
        row_weight = row_weight.expand(rows)  # of a dimension, so that the products below are in float64
    if value is not None:
        row_weight = row_weight * value
    if factor is not None:
        row_weight = row_weight * factor.detach()
    row_weight = row_weight.to(dtype)
    weight = torch.where(mask, row_weight, row_weight.new_zeros(()))
    tokens = Tokens(
        target_ids, seq_id, mask, weight, weight, advantages.to(dtype), old, ref, rollout, value, n, groups
    )
    if old is None or config.correction == "none":
        return tokens
    return replace(tokens, policy_weight=weight * correction_weight(old.to(dtype), tokens, config))


def _row_weight(
    loss: PolicyLoss,
    cu_seqlens: Tensor,
    loss_mask: Tensor | None,
    seq_weight: Tensor | None,
    denominator: Tensor | float | None,
    like: Tensor,
) -> Tensor:
    """What a sampled token of each trajectory weighs, float64 (N,): its weight, its own normaliser and that of the
    batch; 0-d where it is the same for all."""
    if denominator is None:
        denominator = loss_denominator(
            loss.config, cu_seqlens=cu_seqlens, loss_mask=loss_mask, seq_weight=seq_weight
        )
    weight = None if seq_weight is None else seq_weight.double()
    if loss.sequence_mean:
        length = active_tokens(cu_seqlens, loss_mask).clamp(min=1.0)
        weight = 1.0 / length if weight is None else weight / length
    inverse = _inverse(denominator, like)
    if weight is not None:
        return weight * inverse
    if isinstance(inverse, Tensor):
        return inverse
    return torch.full((), inverse, dtype=torch.float64, device=like.device)


def _spoil(target_ids: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """The ids, -1 in rows under the mask where x is not finite: such a row is idle, and counted."""
    return target_ids.masked_fill(mask > (x.abs() < float("inf")), -1)


def _logprobs(
    target_ids: Tensor, mask: Tensor, loss: PolicyLoss, inputs: LossInputs, like: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """(target ids, [old, ref, rollout log-probs]): all there that the loss needs, checked; old and ref finite, rollout
    NaN where the sampler has none."""
    old, ref = inputs.get("old_logprobs"), inputs.get("ref_logprobs")
    rollout = inputs.get("rollout_logprobs")
    for name, x in (("old_logprobs", old), ("ref_logprobs", ref)):
        if x is not None:
            check.floating(name, x, (target_ids.shape[0],), like)
            check.finite(name, x, mask)
            if not check.values_visible(x):  # such a row is then treated as one with a bad id
                target_ids = _spoil(target_ids, mask, x)
    config = loss.config
    if loss.needs_reference and ref is None:
        why = f"kl_coef {config.kl_coef}" if config.kl_coef else f"type {config.type!r}"
        raise ValueError(f"ref_logprobs: missing, with {why}")
    if config.correction != "none" and rollout is None:
        raise ValueError(f"rollout_logprobs: missing, with correction {config.correction!r}")
    # 0 in place of what is not finite, in rows that are masked or idle: 0 x NaN would spoil sums over rows
    given = [None if x is None else x.nan_to_num(0.0, 0.0, 0.0) for x in (old, ref)]
    if rollout is not None:
        check.floating("rollout_logprobs", rollout, (target_ids.shape[0],), like)
        nan = float("nan")
        rollout = rollout.nan_to_num(nan, nan, nan)
    return target_ids, [*given, rollout]


def _check_sources(inputs: LossInputs, loss: PolicyLoss) -> None:
    """Exactly one source of advantages, and one that the loss can use."""
    sources = [k for k in ("advantages", "token_advantages") if inputs.get(k) is not None]
    more = [k for k in ("rewards", "group_id") if inputs.get(k) is not None]
    if not sources and "rewards" not in more:
        raise ValueError("advantages: missing; give advantages, token_advantages, or rewards with group_id")
    if not sources and "group_id" not in more:
        raise ValueError("group_id: missing, rewards need it")
    if len(sources) == 2 or (sources and more):
        first, second = [*sources, *more][:2]
        raise ValueError(f"{second}: given together with {first}; give one of the two")
    if sources == ["token_advantages"] and loss.has_sequence_ratio:
        raise ValueError(
            f"token_advantages: given with the sequence-level ratio of type {loss.config.type!r}, ratio_level "
            f"{loss.config.ratio_level!r}, whose gradient has one advantage a trajectory"
        )


def _advantages(
    like: Tensor, seq_id: Tensor, n: int, inputs: LossInputs, config: GrpoLossConfig, impl: str
) -> Tensor:
    """Advantage of each token (T,)."""
    per_token, per_sequence = inputs.get("token_advantages"), inputs.get("advantages")
    if per_token is not None:
        check.floating("token_advantages", per_token, (seq_id.shape[0],), like)
        check.finite("token_advantages", per_token)
        return per_token
    if per_sequence is not None:
        check.floating("advantages", per_sequence, (None,), like)
        if per_sequence.shape[0] not in (n, seq_id.shape[0]):
            raise ValueError(
                f"advantages: {per_sequence.shape[0]} values for {n} trajectories of {seq_id.shape[0]} tokens"
            )
        check.finite("advantages", per_sequence)
        return per_sequence[seq_id] if per_sequence.shape[0] == n else per_sequence
    rewards, group_id = inputs.get("rewards"), inputs.get("group_id")
    assert rewards is not None and group_id is not None
    _check_rewards(rewards, group_id, n, like)
    made = group_advantage(
        rewards,
        group_id,
        inputs.get("seq_weight"),
        estimator=config.estimator,
        eps=config.advantage_eps,
        impl=impl,
    )
    return made[seq_id]


def _check_rewards(rewards: Tensor, group_id: Tensor, n: int, like: Tensor) -> None:
    """Rewards and group ids of n trajectories."""
    check.floating("rewards", rewards, (n,), like)
    check.tensor("group_id", group_id, (n,), check.OFFSETS, like)
    check.rewards(rewards)


def _inverse(denominator: Tensor | float, like: Tensor) -> Tensor | float:
    """1 / denominator; 0 where the denominator is 0. A 0-d float64 tensor where the denominator is one that the host
    does not look at, and then NaN where it is below 0."""
    if isinstance(denominator, Tensor):
        check.number("denominator", denominator, like)
        if not check.values_visible(denominator):
            d = denominator.double()
            return d.masked_fill(d < 0, float("nan")).reciprocal().nan_to_num(float("nan"), 0.0, 0.0)
    if not denominator >= 0:
        raise ValueError(f"denominator: {denominator} is below 0 or no number")
    d64 = float(denominator)
    return 1.0 / d64 if d64 > 0 else 0.0
