"""The head with its vocabulary split over ranks: rank r of p holds rows [r V/p, (r+1) V/p) of the weight.

A row's statistics over shards s, with maxima m_s, sums S_s = sum exp(u), B_s = sum exp(u) u for u = (z - m_s)
/ T:
    m = max m_s,  d_s = (m_s - m) / T,  S = sum e^d_s S_s,  B = sum e^d_s (B_s + d_s S_s),  z_id = max z_id,s
16 bytes a token and rank travel; gradients of the logits are then local, and d hidden is summed over the
ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgrpo.losses.base import PolicyLoss
from mgrpo.ops import head
from mgrpo.ops.backend import rows
from mgrpo.ops.token_loss import Tokens, name_metrics, needs_two_phases, token_loss


def merge_partials(partials: Tensor, temperature: float) -> Tensor:
    """(p, 4, T) statistics of p shards -> (4, T) of the whole rows: maximum, sum, weighted sum, target logit.

    A pure function; the order of shards changes rounding at most. A shard whose every logit is -inf adds
    nothing.
    """
    shard_max, total, weighted, target = partials.double().unbind(1)
    maximum = shard_max.amax(0)
    d = torch.where(shard_max == -float("inf"), 0.0, (shard_max - maximum) / temperature)
    scale = torch.where(shard_max == -float("inf"), 0.0, d.exp())
    return torch.stack(
        [maximum, (scale * total).sum(0), (scale * (weighted + d * total)).sum(0), target.amax(0)]
    ).to(partials.dtype)


class Sharded:
    """One rank's shard of the vocabulary (head.Shard)."""

    def __init__(self, backend: str, group: dist.ProcessGroup, shard_size: int) -> None:
        self.backend = backend
        self.group = group
        self.offset = dist.get_rank(group) * shard_size
        self.size = shard_size

    def logprob(
        self, logits: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = self.local_ids(target_ids)
        mine = torch.stack(rows(self.backend).row_partials(logits, local, None, temperature))
        shards = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(shards, mine, group=self.group)
        m, s, b, t = merge_partials(torch.stack(shards), temperature).unbind(0)
        return head.finish(m, s, b, t, temperature)

    def loss_rows(
        self, logits: Tensor, tokens: Tokens, loss: PolicyLoss, grad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy, maximum, total = self.logprob(logits, tokens.target_ids, loss.config.temperature)
        if grad is None:
            return logp, entropy, torch.ones_like(logp, dtype=torch.bool)
        with torch.enable_grad():  # the coefficients are the derivatives of the definition, on (n,) vectors
            leaves = [logp.clone().requires_grad_(), entropy.clone().requires_grad_()]
            value, _ = token_loss(leaves[0], leaves[1], tokens, loss)
            c, e = torch.autograd.grad(value, leaves, materialize_grads=True)
        local = self.local_ids(tokens.target_ids)
        rows(self.backend).row_gradients(
            logits, local, (maximum, total, entropy, c, e), loss.config.temperature, grad
        )
        return logp, entropy, (c != 0) | (e != 0)

    def local_ids(self, target_ids: Tensor) -> Tensor:
        """Target ids of this shard, -1 where another rank has the target."""
        local = target_ids - self.offset
        return torch.where((local >= 0) & (local < self.size), local, -1)

    def reduce(self, grad_hidden: Tensor) -> None:
        wide = grad_hidden.float() if grad_hidden.dtype in head.HALF else grad_hidden
        dist.all_reduce(wide, group=self.group)
        if wide is not grad_hidden:
            grad_hidden.copy_(wide)


def loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    loss: PolicyLoss,
    chunk: int,
    backend: str,
    group: dist.ProcessGroup,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """(loss, metrics, logp, entropy) of `linear_grpo_loss` over the ranks of `group`, the last two of active rows;
    weight (V/p, H). Not for compiled graphs."""
    shard = Sharded(backend, group, weight.shape[0])
    if needs_two_phases(loss, tokens.old_logprobs is not None):
        logp, entropy = _Logprob.apply(  # type: ignore[no-untyped-call]
            hidden, weight, tokens, loss, chunk, shard
        )
        return *token_loss(logp, entropy, tokens, loss), logp, entropy
    value, metrics, logp, entropy = _Loss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, tokens, loss, chunk, shard
    )
    return value, name_metrics(metrics), logp, entropy


class _Loss(torch.autograd.Function):
    """Gradient in forward, three products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        loss: PolicyLoss,
        chunk: int,
        shard: Sharded,
    ) -> Any:
        needs = head.Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        value, metrics, logp, entropy, dh, dw = head.loss(hidden, weight, tokens, loss, chunk, needs, shard)
        ctx.needs = needs
        ctx.save_for_backward(dh, dw)
        ctx.mark_non_differentiable(metrics, logp, entropy)
        return value, metrics, logp, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        grads = [
            g * upstream.to(g.dtype) if need else None
            for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return (*grads, None, None, None, None)


class _Logprob(torch.autograd.Function):
    """Log-probs first; the products once every row's coefficient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tokens,
        loss: PolicyLoss,
        chunk: int,
        shard: Sharded,
    ) -> Any:
        ids, active = tokens.target_ids, tokens.active(loss)
        logp, entropy, m, s = head.logprob(hidden, weight, ids, active, loss.config.temperature, chunk, shard)
        ctx.save_for_backward(hidden, weight, ids, m, s, entropy)
        ctx.settings = (loss.config.temperature, chunk, shard)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, c: Tensor, e: Tensor) -> Any:
        hidden, weight, ids, m, s, entropy = ctx.saved_tensors
        temperature, chunk, shard = ctx.settings
        needs = head.Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        dh, dw = head.logprob_backward(
            hidden, weight, ids, (m, s, entropy, c, e), temperature, chunk, needs, shard
        )
        return dh if needs.hidden else None, dw if needs.weight else None, None, None, None, None
