"""The Triton backend: launches the kernels of mgrpo.kernels on CUDA tensors, or on CPU tensors under the
interpreter."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mgrpo.kernels import group_advantage as group_kernels
from mgrpo.kernels import grpo_loss as loss_kernels
from mgrpo.kernels import logprob as row_kernels
from mgrpo.kernels import token_loss as total_kernels
from mgrpo.kernels import tree_merge as merge_kernels
from mgrpo.losses.base import PolicyLoss
from mgrpo.ops.encoding import code, term_code
from mgrpo.ops.token_loss import METRICS, Tokens

THREADS = 1024
"""Of a program on a row whose vocabulary and strides are multiples of 16."""
VEC_BYTES = 16
"""Neighbouring logits that a thread loads at a time: what one instruction loads."""
TILE_BYTES = 32
"""Of a thread's logits on their way at a time, where the row is long enough."""
SCALE_BLOCK, SCALE_PROGRAMS = 4096, 1024
TOTAL_BLOCK, TOTAL_WARPS = 1024, 16
"""Of the one program that makes the loss and its metrics of the rows' log-probs."""
GROUP_BLOCK = 32
"""Rewards a program reduces at a time; with 64 the loss spills on sm_100."""
GROUP_ROWS = 256
"""Rewards whose groups one program does: a few, since a program for each is mostly the starting of programs."""


def group_advantage(
    rewards: Tensor, group_id: Tensor, weight: Tensor | None, estimator: str, eps: float, unbiased: bool
) -> Tensor:
    """Advantages (N,) in the dtype of `rewards`."""
    out = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    n = rewards.numel()
    if n == 0:
        return out
    ids, order = torch.sort(group_id, stable=True)
    r = rewards[order]
    w = r if weight is None else weight[order]
    weighted = weight is not None
    deviation = torch.zeros(1, dtype=torch.float64, device=rewards.device)
    with _on(rewards):
        if estimator == "batch":
            group_kernels.batch_deviation_kernel[(1,)](r, w, deviation, n, weighted, unbiased, BLOCK=1024)
        group_kernels.group_advantage_kernel[(triton.cdiv(n, GROUP_ROWS),)](
            r,
            w,
            ids,
            order,
            deviation,
            out,
            n,
            eps,
            code("estimator", estimator),
            weighted,
            unbiased,
            ROWS=GROUP_ROWS,
            BLOCK=GROUP_BLOCK,
            num_warps=1,
        )
    return out


def loss_rows(
    logits: Tensor, tokens: Tokens, loss: PolicyLoss, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tokens]:
    """As native.loss_rows; where tokens hold groups, the kernel reduces them and the advantages come back in
    tokens."""
    t, v = logits.shape
    logp = torch.empty(t, dtype=torch.float32, device=logits.device)
    entropy, has_grad = torch.empty_like(logp), torch.empty_like(logp, dtype=torch.bool)
    groups = tokens.groups
    advantages = torch.empty_like(logp) if groups else _float(tokens.advantages)
    pw, w = _float(tokens.policy_weight), _float(tokens.weight)
    old, ref, rollout = (
        w if x is None else _float(x)
        for x in (tokens.old_logprobs, tokens.ref_logprobs, tokens.rollout_logprobs)
    )
    rewards = _float(groups.rewards) if groups else w
    seq_weight = _float(groups.weight) if groups and groups.weight is not None else w
    config = loss.config
    low, high = config.correction_bounds
    out = logits if grad is None else grad
    launch = _launch(logits, v, out.stride(0))
    with _on(logits):
        if t:
            loss_kernels.grpo_loss_kernel[(t,)](
                logits,
                out,
                tokens.target_ids,
                tokens.seq_id,
                pw,
                w,
                advantages,
                rewards,
                groups.group_id if groups else tokens.target_ids,
                seq_weight,
                old,
                ref,
                rollout,
                logp,
                entropy,
                has_grad.view(torch.uint8),
                logits.stride(0),
                out.stride(0),
                v,
                rewards.numel() if groups else 0,
                math.log2(math.e) / config.temperature,
                1.0 / config.temperature,
                config.clip_eps_low,
                config.clip_eps_high,
                math.inf if config.delta is None else config.delta,
                config.log_ratio_clip,
                config.sapo_temperature_pos,
                config.sapo_temperature_neg,
                config.kl_coef,
                config.entropy_coef,
                low,
                high,
                config.advantage_eps,
                LOSS=term_code(loss),
                KL=code("kl_estimator", config.kl_estimator) if config.kl_coef else 0,
                ENTROPY=config.entropy_coef > 0,
                CORRECTION=code(
                    "correction", "none" if tokens.old_logprobs is not None else config.correction
                ),
                GROUPS=groups is not None,
                WEIGHTED=groups is not None and groups.weight is not None,
                ESTIMATOR=code("estimator", config.estimator),
                HAS_OLD=tokens.old_logprobs is not None,
                NEED_GRAD=grad is not None,
                BLOCK=launch.block,
                VEC=launch.vec,
                TILES=launch.tiles,
                BLOCK_N=GROUP_BLOCK,
                num_warps=launch.warps,
                maxnreg=launch.registers,
            )
    if groups:
        tokens = tokens.with_advantages(advantages)
    return logp, entropy, has_grad, tokens


def token_loss(logp: Tensor, entropy: Tensor, tokens: Tokens, loss: PolicyLoss) -> tuple[Tensor, Tensor]:
    """As native.token_loss, in one launch."""
    config = loss.config
    value, metrics = logp.new_empty(()), logp.new_empty(len(METRICS))
    pw, w = _float(tokens.policy_weight), _float(tokens.weight)
    given = (tokens.old_logprobs, tokens.ref_logprobs, tokens.rollout_logprobs)
    old, ref, rollout = (w if x is None else _float(x) for x in given)
    lower, upper = loss.ratio_bounds()
    low, high = config.correction_bounds
    with _on(logp):
        total_kernels.token_loss_kernel[(1,)](
            logp,
            entropy,
            tokens.mask.view(torch.uint8),
            pw,
            w,
            _float(tokens.advantages),
            old,
            ref,
            rollout,
            value,
            metrics,
            logp.numel(),
            lower,
            upper,
            math.inf if config.delta is None else config.delta,
            config.log_ratio_clip,
            config.sapo_temperature_pos,
            config.sapo_temperature_neg,
            config.kl_coef,
            config.entropy_coef,
            low,
            high,
            LOSS=term_code(loss),
            KL=code("kl_estimator", config.kl_estimator),
            KL_ACTS=config.kl_coef > 0,
            ENTROPY=config.entropy_coef > 0,
            CORRECTION=code("correction", "none" if given[0] is not None else config.correction),
            HAS_OLD=given[0] is not None,
            HAS_REF=given[1] is not None,
            HAS_ROLLOUT=given[2] is not None,
            BLOCK=TOTAL_BLOCK,
            num_warps=TOTAL_WARPS,
        )
    return value, metrics


class Launch(NamedTuple):
    """How a kernel of whole rows is launched: logits of all its threads at a time (BLOCK), of one thread (VEC), BLOCKs
    that are loaded together (TILES), warps, and the registers a thread may take."""

    block: int
    vec: int
    tiles: int
    warps: int
    registers: int


def row_launch(aligned: bool, element_size: int) -> Launch:
    """aligned: vocabulary and row strides are multiples of 16, so that a thread loads 16 bytes at a time. element_size:
    bytes of a logit.

    A multiprocessor works on one row, with all its threads: of the few rows in flight more is still in the L2 cache
    when the gradient sweep reads them again than with 8 warps and four times the rows. Rows that are not aligned take
    more registers than 32 warps have. Left to choose the registers, ptxas squeezes some kernels for a second row on the
    multiprocessor, and spills.
    """
    vec = VEC_BYTES // element_size
    tiles = TILE_BYTES // VEC_BYTES
    if aligned:
        return Launch(THREADS * vec, vec, tiles, 32, 64)
    return Launch(max(THREADS // 2, 1) * vec, vec, 1, 16, 128)


def _launch(logits: Tensor, *sizes: int) -> Launch:
    aligned = all(size % 16 == 0 for size in (logits.stride(0), *sizes))
    return row_launch(aligned, logits.element_size())


def row_partials(
    logits: Tensor, target_ids: Tensor, active: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As native.row_partials."""
    t, v = logits.shape
    maximum = torch.empty(t, dtype=torch.float32, device=logits.device)
    out = (maximum, torch.empty_like(maximum), torch.empty_like(maximum), torch.empty_like(maximum))
    active_rows = target_ids if active is None else active.view(torch.uint8)
    launch = _launch(logits, v)
    with _on(logits):
        if t:
            row_kernels.partials_kernel[(t,)](
                logits,
                target_ids,
                active_rows,
                *out,
                logits.stride(0),
                v,
                math.log2(math.e) / temperature,
                HAS_ACTIVE=active is not None,
                BLOCK=launch.block,
                VEC=launch.vec,
                TILES=launch.tiles,
                num_warps=launch.warps,
                maxnreg=launch.registers,
            )
    return out


def row_gradients(
    logits: Tensor,
    target_ids: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    grad: Tensor,
) -> None:
    """As native.row_gradients."""
    t, v = logits.shape
    launch = _launch(logits, v, grad.stride(0))
    with _on(logits):
        if t:
            row_kernels.gradient_kernel[(t,)](
                logits,
                grad,
                target_ids,
                *(_float(x) for x in coefficients),
                logits.stride(0),
                grad.stride(0),
                v,
                math.log2(math.e) / temperature,
                1.0 / temperature,
                BLOCK=launch.block,
                TILES=launch.tiles,
                num_warps=launch.warps,
                maxnreg=launch.registers,
            )


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor (one number on x's device) in place, without a sweep over x where the factor is 1: the host does not
    know, and backward almost always has 1."""
    n = x.numel()
    with _on(x):
        if n:
            grid = (min(triton.cdiv(n, SCALE_BLOCK), SCALE_PROGRAMS),)
            row_kernels.scale_kernel[grid](x, factor, n, BLOCK=SCALE_BLOCK, num_warps=8)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: make it the tensor's."""
    if x.device.type == "cpu" and isinstance(row_kernels.partials_kernel, triton.JITFunction):
        raise ValueError(
            "impl: 'triton' on the cpu needs the interpreter (TRITON_INTERPRET=1 before the import)"
        )
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _float(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def tree_merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, at: slice | Tensor) -> None:
    """Into out (T, H, D) and lse f32 (H, T), which are contiguous, what the tokens `at` see more: more (n, H, D) and
    more_lse f32 (H, n)."""
    n, heads, dim = more.shape
    places, first = (lse, at.start) if isinstance(at, slice) else (at, 0)
    with _on(out):
        merge_kernels.tree_merge_kernel[(triton.cdiv(n, merge_kernels.BLOCK), heads)](
            out,
            lse,
            more.contiguous(),
            more_lse.contiguous(),
            places,
            first,
            lse.shape[1],
            n,
            HEADS=heads,
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim),
            LISTED=isinstance(at, Tensor),
            BLOCK=merge_kernels.BLOCK,
        )
