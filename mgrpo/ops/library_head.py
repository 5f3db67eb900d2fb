"""The vocabulary head as registered ops; the rows' ops and what both share are in library.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mgrpo.ops import head
from mgrpo.ops.encoding import decode
from mgrpo.ops.library import fake_value, gather, save_grad, scale_grad


@torch.library.custom_op("mgrpo::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    active: Tensor,
    temperature: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, maximum, sum), float32 (T,); 0, 0, 0, 1 where `active` is False. hidden (T, H) or (B, S, H)."""
    return head.logprob(hidden, weight, target_ids, active, temperature, chunk, head.Local(backend))


@linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    active: Tensor,
    temperature: float,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (hidden.new_empty(target_ids.shape, dtype=torch.float32) for _ in range(4))
    return a, b, c, d


@torch.library.custom_op("mgrpo::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    coefficients: list[Tensor],
    temperature: float,
    chunk: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(d hidden, d weight), each empty where needs says so; rows with c = e = 0 are dropped."""
    m, s, h, c, e = coefficients
    return head.logprob_backward(
        hidden,
        weight,
        target_ids,
        (m, s, h, c, e),
        temperature,
        chunk,
        head.Needs(*needs),
        head.Local(backend),
    )


@linear_logprob_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    coefficients: list[Tensor],
    temperature: float,
    chunk: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return head.empty_like_needed(hidden, weight, head.Needs(*needs))


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target_ids, _, ctx.temperature, ctx.chunk, ctx.backend = inputs
    _, entropy, maximum, total = output
    ctx.save_for_backward(hidden, weight, target_ids, maximum, total, entropy)


def _head_backward(ctx: Any, c: Tensor, e: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, target_ids, maximum, total, entropy = ctx.saved_tensors
    needs = [bool(x) for x in ctx.needs_input_grad[:2]]
    grads = linear_logprob_backward(
        hidden,
        weight,
        target_ids,
        [maximum, total, entropy, c, e],
        ctx.temperature,
        ctx.chunk,
        needs,
        ctx.backend,
    )
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *([None] * 5))


linear_logprob.register_autograd(_head_backward, setup_context=_save_head)


@torch.library.custom_op("mgrpo::linear_grpo_loss", mutates_args=())
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: list[Tensor],
    present: list[bool],
    num_sequences: int,
    settings: list[float],
    chunk: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, logp, entropy, d hidden, d weight): logp and entropy float32 (T,), of the active rows; gradients
    empty where needs says so. hidden (T, H) or (B, S, H)."""
    return head.loss(
        hidden,
        weight,
        gather(tokens, present, num_sequences),
        decode(settings),
        chunk,
        head.Needs(*needs),
        head.Local(backend),
    )


@linear_grpo_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    tokens: list[Tensor],
    present: list[bool],
    num_sequences: int,
    settings: list[float],
    chunk: int,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(hidden.shape[:-1])
    return *fake_value(hidden, rows), *head.empty_like_needed(hidden, weight, head.Needs(*needs))


linear_grpo_loss.register_autograd(scale_grad, setup_context=save_grad)
