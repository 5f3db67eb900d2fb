"""The ops as torch knows them: torch.library registration with fake kernels and autograd.

Each op is opaque to the compiler, takes only tensors, numbers and strings, and returns its gradient beside
its value (gradient in forward), so that backward is one product with the upstream gradient, on the device.
`backend` is "cpu" or "triton"; the reference backend is plain torch and needs no registration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mgrpo.ops import head
from mgrpo.ops.backend import rows, scale_in_place
from mgrpo.ops.encoding import decode
from mgrpo.ops.token_loss import METRICS, VECTORS, Groups, Tokens

# -- group_advantage
# -----------------------------------------------------------------------------------------------


@torch.library.custom_op("mgrpo::group_advantage", mutates_args=())
def group_advantage(
    rewards: Tensor, group_id: Tensor, weight: Tensor | None, estimator: str, eps: float, unbiased: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    """Advantages (N,)."""
    return rows(backend).group_advantage(rewards, group_id, weight, estimator, eps, unbiased)


@group_advantage.register_fake
def _(
    rewards: Tensor, group_id: Tensor, weight: Tensor | None, estimator: str, eps: float, unbiased: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(rewards)


# -- log-prob and entropy of rows of logits
# ------------------------------------------------------------------------


@torch.library.custom_op("mgrpo::row_logprob", mutates_args=())
def row_logprob(
    logits: Tensor, target_ids: Tensor, active: Tensor, temperature: float, inplace: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, maximum, sum), float32 (T,); 0, 0, 0, 1 where `active` is False. inplace: backward may use the
    storage of logits for its gradient."""
    partials = rows(backend).row_partials(logits, target_ids, active, temperature)
    return head.finish(*partials, temperature)


@row_logprob.register_fake
def _(
    logits: Tensor, target_ids: Tensor, active: Tensor, temperature: float, inplace: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))
    return a, b, c, d


@torch.library.custom_op("mgrpo::row_logprob_backward", mutates_args=())
def row_logprob_backward(
    logits: Tensor, target_ids: Tensor, coefficients: list[Tensor], temperature: float, backend: str
) -> Tensor:
    """d (sum c logp + e entropy) / d logits; coefficients: maximum, sum, entropy, c, e."""
    grad = torch.empty_like(logits)
    m, s, h, c, e = coefficients
    rows(backend).row_gradients(logits, target_ids, (m, s, h, c, e), temperature, grad)
    return grad


@row_logprob_backward.register_fake
def _(
    logits: Tensor, target_ids: Tensor, coefficients: list[Tensor], temperature: float, backend: str
) -> Tensor:
    return torch.empty_like(logits)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target_ids, _, ctx.temperature, ctx.inplace, ctx.backend = inputs
    _, entropy, maximum, total = output
    ctx.save_for_backward(logits, target_ids, maximum, total, entropy)


def _rows_backward(ctx: Any, c: Tensor, e: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    logits, target_ids, maximum, total, entropy = ctx.saved_tensors
    if ctx.inplace and not torch.compiler.is_compiling():
        grad = logits.detach()
        held = (maximum, total, entropy, c, e)
        rows(ctx.backend).row_gradients(grad, target_ids, held, ctx.temperature, grad)
    else:
        held_list = [maximum, total, entropy, c, e]
        grad = row_logprob_backward(logits, target_ids, held_list, ctx.temperature, ctx.backend)
    return grad, None, None, None, None, None


row_logprob.register_autograd(_rows_backward, setup_context=_save_rows)


# -- loss from logits
# ----------------------------------------------------------------------------------------------


def gather(tensors: list[Tensor], present: list[bool], num_sequences: int) -> Tokens:
    """Tokens from the arguments of an op (`flatten` is the way there)."""
    given = iter(tensors)
    found: list[Any] = [next(given) if here else None for here in present]
    vectors: dict[str, Any] = dict(zip(VECTORS, found, strict=False))
    rewards, group_id, seq_weight = found[len(VECTORS) :]
    groups = None if rewards is None else Groups(rewards, group_id, seq_weight)
    return Tokens(**vectors, num_sequences=num_sequences, groups=groups)


def flatten(tokens: Tokens) -> tuple[list[Tensor], list[bool], int]:
    """Tokens as the arguments of an op: which of the VECTORS and of the three tensors of the groups are there, these
    tensors, and num_sequences."""
    g = tokens.groups
    groups = (None, None, None) if g is None else (g.rewards, g.group_id, g.weight)
    found = [*[getattr(tokens, name) for name in VECTORS], *groups]
    return [x for x in found if x is not None], [x is not None for x in found], tokens.num_sequences


@torch.library.custom_op("mgrpo::grpo_loss", mutates_args=())
def grpo_loss(
    logits: Tensor,
    tokens: list[Tensor],
    present: list[bool],
    num_sequences: int,
    settings: list[float],
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, logp, entropy, d loss / d logits or empty); logp and entropy float32 (T,), of the active rows."""
    grad = torch.empty_like(logits) if need_grad else None
    known = _loss_rows(logits, gather(tokens, present, num_sequences), settings, grad, backend)
    return *known, logits.new_empty(0) if grad is None else grad


@grpo_loss.register_fake
def _(
    logits: Tensor,
    tokens: list[Tensor],
    present: list[bool],
    num_sequences: int,
    settings: list[float],
    need_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = torch.empty_like(logits) if need_grad else logits.new_empty(0)
    return *fake_value(logits, logits.shape[0]), grad


@torch.library.custom_op("mgrpo::grpo_loss_", mutates_args=("logits",))
def grpo_loss_(
    logits: Tensor,
    tokens: list[Tensor],
    present: list[bool],
    num_sequences: int,
    settings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, logp, entropy); d loss / d logits overwrites logits."""
    return _loss_rows(logits, gather(tokens, present, num_sequences), settings, logits, backend)


@grpo_loss_.register_fake
def _(
    logits: Tensor,
    tokens: list[Tensor],
    present: list[bool],
    num_sequences: int,
    settings: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_value(logits, logits.shape[0])


def fake_value(like: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics, logp, entropy) of a fast backend, uninitialised."""
    shapes = ((), (len(METRICS),), (rows,), (rows,))
    a, b, c, d = (like.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return a, b, c, d


def _loss_rows(
    logits: Tensor, tokens: Tokens, settings: list[float], grad: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = decode(settings)
    logp, entropy, _, tokens = rows(backend).loss_rows(logits, tokens, loss, grad)
    return *rows(backend).token_loss(logp, entropy, tokens, loss), logp, entropy


_VALUES = 4  # outputs of an op of the loss before its gradients


def save_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients an op returned after (loss, metrics, logp, entropy); they belong to its first inputs."""
    ctx.set_materialize_grads(False)  # else backward gets zeros as large as each gradient kept here
    grads = output[_VALUES:]
    ctx.save_for_backward(*grads)
    # autograd wants one None for each tensor of a list
    ctx.tail = [
        [None] * len(x) if isinstance(x, list) and isinstance(x[0], Tensor) else None
        for x in inputs[len(grads) :]
    ]
    ctx.spent = False


def scale_grad(ctx: Any, upstream: Tensor, *_: None) -> tuple[Any, ...]:
    """The kept gradients times the upstream one, on the device. Nothing but the loss has an upstream gradient:
    metrics and values come detached, the gradients stay inside the op."""
    if ctx.spent:
        raise RuntimeError("grpo loss: a second backward after one that scaled the gradient in place")
    grads: list[Tensor | None] = []
    for g, needed in zip(
        ctx.saved_tensors, ctx.needs_input_grad, strict=False
    ):  # gradients of the first inputs
        if not needed:
            grads.append(None)
        elif torch.compiler.is_compiling() or type(upstream) is not Tensor:  # traced: no look, no mutation
            grads.append(g * upstream.to(g.dtype))
        elif upstream.device.type == "cpu" and float(upstream) == 1.0:  # looking is free here
            grads.append(g.detach())
        else:
            ctx.spent = True
            scaled = g.detach()
            scale_in_place(scaled, upstream)
            grads.append(scaled)
    return (*grads, *ctx.tail)


grpo_loss.register_autograd(scale_grad, setup_context=save_grad)


class InPlace(torch.autograd.Function):
    """`grpo_loss_` with autograd: the storage of logits becomes its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tokens, settings: list[float], backend: str) -> Any:
        grad = logits.detach()
        loss, *others = grpo_loss_(grad, *flatten(tokens), settings, backend)
        ctx.grad = grad
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Any:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("grpo_loss(inplace=True): backward a second time; the gradient is gone")
        if torch.compiler.is_compiling():
            grad.mul_(upstream.to(grad.dtype))
        else:
            scale_in_place(grad, upstream)
        return grad, None, None, None
