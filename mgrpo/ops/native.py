"""The CPU backend: tensors in, addresses to mgrpo._C, tensors out. The only module that hands addresses to
C++."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo import _C
from mgrpo.losses.base import PolicyLoss
from mgrpo.ops.encoding import code, term_code
from mgrpo.ops.token_loss import Tokens, stack
from mgrpo.ops.token_loss import token_loss as reference


def group_advantage(
    rewards: Tensor, group_id: Tensor, weight: Tensor | None, estimator: str, eps: float, unbiased: bool
) -> Tensor:
    """Advantages (N,) in the dtype of `rewards`, computed from float32."""
    r, w = _float(rewards), None if weight is None else _rows_of(weight, rewards.numel())
    ids = _int32_ids(group_id).contiguous()
    _check_vector("group_id", ids, r.numel(), torch.int32)
    out = torch.empty_like(r)
    _C.group_advantage(
        r.data_ptr(),
        ids.data_ptr(),
        _address(w),
        r.numel(),
        code("estimator", estimator),
        eps,
        unbiased,
        out.data_ptr(),
    )
    return out.to(rewards.dtype)


def _int32_ids(group_id: Tensor) -> Tensor:
    """Ids (N,) that tell the same groups apart as int32: themselves where they fit, else their places among the sorted
    ones."""
    if group_id.dtype == torch.int32 or not group_id.numel():
        return group_id.int()
    low, high = (int(x) for x in group_id.aminmax())
    if low < -(2**31) or high >= 2**31:
        group_id = torch.unique(group_id, return_inverse=True)[1]
    return group_id.int()


def loss_rows(
    logits: Tensor, tokens: Tokens, loss: PolicyLoss, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tokens]:
    """(logp, entropy, has_grad, tokens); d loss / d logits goes into `grad` (which may be `logits`) unless None.

    logp and entropy float32 (T,), 0 in masked rows and NaN in rows that are not finite; has_grad bool (T,): the
    row's gradient is not all 0.
    """
    inputs = (
        tokens.policy_weight,
        tokens.weight,
        tokens.advantages,
        tokens.old_logprobs,
        tokens.ref_logprobs,
        tokens.rollout_logprobs,
    )
    held = [None if x is None else _rows_of(x, logits.shape[0]) for x in inputs]
    if grad is not None:
        _check_grad(grad, logits)
    logp = torch.empty(logits.shape[0], dtype=torch.float32)
    entropy, has_grad = torch.empty_like(logp), torch.empty_like(logp, dtype=torch.bool)
    _C.loss_rows(
        _rows(logits, tokens.target_ids, loss.config.temperature),
        [_address(x) for x in held],
        _settings(loss, correct=tokens.old_logprobs is None),
        _address(grad),
        logp.data_ptr(),
        entropy.data_ptr(),
        has_grad.data_ptr(),
    )
    return logp, entropy, has_grad, tokens


def token_loss(logp: Tensor, entropy: Tensor, tokens: Tokens, loss: PolicyLoss) -> tuple[Tensor, Tensor]:
    """(loss 0-d, METRICS as a vector), float32, of the rows' logp and entropy (T,), for a loss whose term the kernels
    know."""
    value, metrics = reference(logp, entropy, tokens, loss)
    return value, stack(metrics)


def row_partials(
    logits: Tensor, target_ids: Tensor, active: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(maximum, sum, weighted, target) float32 (T,) of each row, or of its shard (ids outside it: target
    -inf).

    active: bool (T,); rows where it is False are not read and get (0, 1, 0, 0), a log-prob of 0.
    """
    if active is not None:
        _check_vector("active", active, logits.shape[0], torch.bool)
    maximum = torch.empty(logits.shape[0], dtype=torch.float32)
    out = (maximum, torch.empty_like(maximum), torch.empty_like(maximum), torch.empty_like(maximum))
    _C.row_partials(_rows(logits, target_ids, temperature), _address(active), *(x.data_ptr() for x in out))
    return out


def row_gradients(
    logits: Tensor,
    target_ids: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    grad: Tensor,
) -> None:
    """Gradient of sum c logp + e entropy into `grad` (may be `logits`); coefficients: maximum, sum, entropy, c, e."""
    _check_grad(grad, logits)
    held = [_rows_of(x, logits.shape[0]) for x in coefficients]
    _C.row_gradients(_rows(logits, target_ids, temperature), [x.data_ptr() for x in held], grad.data_ptr())


def _settings(loss: PolicyLoss, correct: bool) -> _C.TokenSettings:
    """correct: the token-level correction is not in policy_weight yet (there are no old log-probs)."""
    config = loss.config
    low, high = config.correction_bounds
    return _C.TokenSettings(
        term=term_code(loss),
        clip_eps_low=config.clip_eps_low,
        clip_eps_high=config.clip_eps_high,
        delta=float("inf") if config.delta is None else config.delta,
        log_ratio_clip=config.log_ratio_clip,
        sapo_temperature_pos=config.sapo_temperature_pos,
        sapo_temperature_neg=config.sapo_temperature_neg,
        kl_coef=config.kl_coef,
        kl_estimator=code("kl_estimator", config.kl_estimator),
        entropy_coef=config.entropy_coef,
        correction=code("correction", config.correction if correct else "none"),
        correction_low=low,
        correction_high=high,
    )


def _rows(logits: Tensor, target_ids: Tensor, temperature: float) -> _C.LogitRows:
    """Rows at the address of contiguous logits (T, V), float32 or bfloat16; ValueError or TypeError otherwise."""
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"logits: dtype {logits.dtype} is neither torch.float32 nor torch.bfloat16")
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"logits: shape {tuple(logits.shape)}, strides {logits.stride()} are not contiguous rows"
        )
    _check_vector("target_ids", target_ids, logits.shape[0], torch.int64)
    return _C.LogitRows(
        logits=logits.data_ptr(),
        bfloat16=logits.dtype == torch.bfloat16,
        rows=logits.shape[0],
        vocabulary=logits.shape[1],
        stride=logits.shape[1],
        target_ids=target_ids.data_ptr(),
        temperature=temperature,
        threads=torch.get_num_threads(),
    )


def _check_vector(name: str, x: Tensor, n: int, dtype: torch.dtype) -> None:
    """ValueError unless x is a contiguous vector of n values of this dtype: C++ sees an address alone."""
    if x.dtype != dtype or x.shape != (n,) or not x.is_contiguous():
        raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)} where contiguous {dtype} ({n},) is needed")


def _check_grad(grad: Tensor, logits: Tensor) -> None:
    if grad.dtype != logits.dtype or grad.shape != logits.shape or not grad.is_contiguous():
        raise ValueError(
            f"grad: {grad.dtype} {tuple(grad.shape)} where contiguous {logits.dtype} {tuple(logits.shape)} is needed"
        )


def _rows_of(x: Tensor, n: int) -> Tensor:
    """x (n,) as float32 at an address."""
    if x.shape != (n,):
        raise ValueError(f"inputs: shape {tuple(x.shape)} where one value for each of {n} rows is needed")
    return _float(x)


def _float(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
