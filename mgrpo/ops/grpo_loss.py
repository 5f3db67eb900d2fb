"""The GRPO family's loss from logits: group statistics, token loss and the gradient over the vocabulary.

The formula and its deviations are in token_loss.py; the advantages are group_advantage.py's, weighted by the
alignment weights (duplicates count in the statistics as in the loss).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.ops import check, encoding
from mgrpo.ops.backend import choose
from mgrpo.ops.group_advantage import group_advantage
from mgrpo.ops.selective_logprob import compute_dtype, row_logprob
from mgrpo.ops.token_loss import (
    Groups,
    Tokens,
    active_tokens,
    correction_weight,
    loss_denominator,
    needs_two_phases,
    token_loss,
)


def grpo_loss(
    logits: Tensor,
    target_ids: Tensor,
    *,
    cu_seqlens: Tensor,
    rewards: Tensor | None = None,
    group_id: Tensor | None = None,
    seq_weight: Tensor | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    config: GrpoLossConfig,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss 0-d, metrics) of T tokens in N trajectories; row t of `logits` scores target_ids[t].

    logits (T, V); target_ids int64 (T,); cu_seqlens int32 (N+1,) delimits trajectories. Either rewards (N,)
    with group_id int32 (N,), whose groups must then be whole, or advantages (N,) or (T,). seq_weight (N,):
    the alignment weight of each trajectory (None: 1). old/ref/rollout_logprobs (T,) in nats; without
    old_logprobs the policy is its own old policy (ratio 1). loss_mask (T,): non-zero where the token was
    sampled by this policy.

    denominator: what the weighted sum is divided by; None: this batch's own (`loss_denominator`). Pass the
    whole minibatch's when a batch is a micro-batch, and losses and gradients simply add up.

    inplace: the gradient overwrites `logits` (its values are lost to every other reader).

    Returns the loss in float32 (float64 for float64 logits), differentiable in `logits`, and METRICS as 0-d
    tensors on the same device; nothing here synchronises with it. Raises TypeError/ValueError naming the
    argument and the bound.
    """
    check.floating("logits", logits, (None, None), logits)
    check.ids(target_ids, logits.shape[0], logits.shape[1], logits)
    backend = choose(impl, logits.device, logits.dtype)
    tokens = prepare(
        logits,
        target_ids,
        cu_seqlens=cu_seqlens,
        rewards=rewards,
        group_id=group_id,
        seq_weight=seq_weight,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        loss_mask=loss_mask,
        denominator=denominator,
        config=config,
        impl=backend,
        fuse_groups=backend == "triton" and not needs_two_phases(config, old_logprobs is not None),
    )
    if backend == "reference":
        return token_loss(*row_logprob(logits, tokens.target_ids, config.temperature), tokens, config)
    from mgrpo.ops import library

    z = logits.contiguous()
    need_grad = torch.is_grad_enabled() and logits.requires_grad
    if needs_two_phases(config, old_logprobs is not None):
        live = tokens.live(config)
        logp, entropy, *_ = library.row_logprob(
            z, tokens.target_ids, live, config.temperature, inplace, backend
        )
        return token_loss(logp, entropy, tokens, config)
    if inplace and need_grad and not torch.compiler.is_compiling():  # a compiler plans its own memory
        settings = encoding.encode(config)
        loss, metrics = library.InPlace.apply(  # type: ignore[no-untyped-call]
            z, tokens, settings, backend
        )
    else:
        settings = encoding.encode(config)
        loss, metrics, _ = library.grpo_loss(z, *library.flatten(tokens), settings, need_grad, backend)
    return loss, library.name_metrics(metrics)


def prepare(
    like: Tensor,
    target_ids: Tensor,
    *,
    cu_seqlens: Tensor,
    rewards: Tensor | None,
    group_id: Tensor | None,
    seq_weight: Tensor | None,
    advantages: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    loss_mask: Tensor | None,
    denominator: Tensor | float | None,
    config: GrpoLossConfig,
    impl: str,
    fuse_groups: bool = False,
) -> Tokens:
    """Check the arguments of a loss call and fold mask, votes, normaliser and what is known of the
    correction.

    fuse_groups: leave rewards to the kernel, which reduces each row's group itself (`advantages` are then 1).
    """
    if not isinstance(config, GrpoLossConfig):
        raise TypeError(f"config: expected GrpoLossConfig, got {type(config).__name__}")
    rows, n = target_ids.shape[0], max(cu_seqlens.numel() - 1, 0)
    check.cu_seqlens(cu_seqlens, rows, like)
    check.mask(loss_mask, rows, like)
    check.vote("seq_weight", seq_weight, n, like)
    _check_sources(rewards, group_id, advantages)
    encoding.check_names(config)
    mask = torch.ones_like(target_ids, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    given = (old_logprobs, ref_logprobs, rollout_logprobs)
    for name, x in zip(("old_logprobs", "ref_logprobs", "rollout_logprobs"), given, strict=True):
        if x is not None:
            check.floating(name, x, (rows,), like)
            check.finite(name, x, mask)
            if not check.values_visible(
                x
            ):  # such a row is then treated as one with a bad id: idle, and counted
                target_ids = torch.where(x.isfinite() | ~mask, target_ids, -1)
    old_logprobs, ref_logprobs, rollout_logprobs = (_finite(x) for x in given)
    if config.kl_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: missing, with kl_coef {config.kl_coef}")
    if config.correction != "none" and rollout_logprobs is None:
        raise ValueError(f"rollout_logprobs: missing, with correction {config.correction!r}")
    dtype = compute_dtype(like)
    seq_id = torch.repeat_interleave(cu_seqlens.diff(), output_size=rows).long()
    groups = None
    if fuse_groups and rewards is not None and group_id is not None:
        check_rewards(rewards, group_id, n, like)
        choose(impl, rewards.device, rewards.dtype)  # the kernel takes no more than group_advantage would
        groups, advantages = Groups(rewards, group_id, seq_weight), torch.ones_like(target_ids, dtype=dtype)
        rewards = None
    per_token = _advantages(like, seq_id, n, rewards, group_id, seq_weight, advantages, config, impl)
    votes = cu_seqlens.new_ones(n, dtype=torch.float64) if seq_weight is None else seq_weight.double()
    if config.sequence_mean:
        votes = votes / active_tokens(cu_seqlens, loss_mask).clamp(min=1.0)
    if denominator is None:
        denominator = loss_denominator(
            config, cu_seqlens=cu_seqlens, loss_mask=loss_mask, seq_weight=seq_weight
        )
    votes = votes * _inverse(denominator, like)
    weight = torch.where(mask, votes[seq_id], 0.0).to(dtype)
    tokens = Tokens(
        target_ids=target_ids,
        seq_id=seq_id,
        mask=mask,
        weight=weight,
        policy_weight=weight,
        advantages=per_token.to(dtype),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        num_sequences=n,
        groups=groups,
    )
    if old_logprobs is None or config.correction == "none":
        return tokens
    return replace(tokens, policy_weight=weight * correction_weight(old_logprobs.to(dtype), tokens, config))


def _finite(logprobs: Tensor | None) -> Tensor | None:
    """0 in place of what is not finite, in rows that are masked or idle: 0 x NaN would spoil sums over rows."""
    return None if logprobs is None else torch.where(logprobs.isfinite(), logprobs, 0.0)


def _check_sources(rewards: Tensor | None, group_id: Tensor | None, advantages: Tensor | None) -> None:
    """Exactly one source of advantages."""
    if advantages is None:
        if rewards is None:
            raise ValueError("advantages: missing; give advantages, or rewards with group_id")
        if group_id is None:
            raise ValueError("group_id: missing, rewards need it")
    elif rewards is not None or group_id is not None:
        name = "rewards" if rewards is not None else "group_id"
        raise ValueError(f"{name}: given together with advantages; give one of the two")


def _advantages(
    like: Tensor,
    seq_id: Tensor,
    n: int,
    rewards: Tensor | None,
    group_id: Tensor | None,
    seq_weight: Tensor | None,
    advantages: Tensor | None,
    config: GrpoLossConfig,
    impl: str,
) -> Tensor:
    """Advantage of each token (T,)."""
    if advantages is not None:
        if advantages.dim() == 1 and advantages.shape[0] not in (n, seq_id.shape[0]):
            raise ValueError(
                f"advantages: {advantages.shape[0]} values for {n} trajectories of {seq_id.shape[0]} tokens"
            )
        check.floating("advantages", advantages, (None,), like)
        check.finite("advantages", advantages)
        return advantages[seq_id] if advantages.shape[0] == n else advantages
    assert rewards is not None and group_id is not None
    check_rewards(rewards, group_id, n, like)
    per_sequence = group_advantage(
        rewards, group_id, seq_weight, estimator=config.estimator, eps=config.advantage_eps, impl=impl
    )
    return per_sequence[seq_id]


def check_rewards(rewards: Tensor, group_id: Tensor, n: int, like: Tensor) -> None:
    """Rewards and group ids of n trajectories."""
    check.floating("rewards", rewards, (n,), like)
    check.tensor("group_id", group_id, (n,), (torch.int32,), like)
    check.rewards(rewards)


def _inverse(denominator: Tensor | float, like: Tensor) -> Tensor:
    """1 / denominator as a 0-d float64 tensor; 0 where there is nothing to divide."""
    if isinstance(denominator, Tensor):
        check.floating("denominator", denominator, (), like)
        d = denominator.double()
    else:
        if not denominator > 0:
            raise ValueError(f"denominator: {denominator} is not above 0")
        d = torch.full((), denominator, dtype=torch.float64, device=like.device)
    return torch.where(d > 0, 1.0 / d, 0.0)
