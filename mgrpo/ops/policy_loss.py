"""The losses from log-probs: for a trainer that has computed those of the sampled tokens by itself.

The formula and its deviations are in token_loss.py. It is plain torch on vectors of T tokens, differentiable by
autograd, and what `grpo_loss(impl="reference")` computes once it has its log-probs.
"""

from __future__ import annotations

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.losses.base import PolicyLoss
from mgrpo.ops import check
from mgrpo.ops.grpo_loss import LossInputs, known_loss, prepare
from mgrpo.ops.selective_logprob import compute_dtype
from mgrpo.ops.token_loss import token_loss
from mgrpo.ops.token_values import TokenValues, token_values


@overload
def policy_loss(
    logprobs: Tensor,
    *,
    config: GrpoLossConfig,
    entropy: Tensor | None = None,
    tokens: Literal[False] = False,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def policy_loss(
    logprobs: Tensor,
    *,
    config: GrpoLossConfig,
    entropy: Tensor | None = None,
    tokens: Literal[True],
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor], TokenValues]: ...


def policy_loss(
    logprobs: Tensor,
    *,
    config: GrpoLossConfig,
    entropy: Tensor | None = None,
    tokens: bool = False,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], TokenValues]:
    """(loss 0-d, metrics) of the tokens of N trajectories whose log-probs are known.

    logprobs, packed (T,) with cu_seqlens or padded (B, S): log pi(token) in nats under the policy that is trained, at
    the temperature of `config`, by which nothing is divided here. entropy, of the same shape: of the policy at each
    token, in nats; needed with entropy_coef above 0 and by a loss of one's own whose `uses_entropy` is not False.
    inputs: the keyword arguments of `LossInputs`, as for `grpo_loss`. tokens: return a third value, `TokenValues`, and
    the metric "entropy_all".

    Returns the loss in float32 (float64 for float64 log-probs), differentiable in logprobs and entropy, and METRICS as
    0-d tensors on the same device. Where no entropy was given, metrics and values of it are NaN. A token under the mask
    whose log-prob or entropy is not finite contributes nothing and is counted. torch.autocast changes nothing. Raises
    TypeError/ValueError naming the argument and the bound, and ConfigError for a loss that cannot be found.
    """
    two = isinstance(logprobs, Tensor) and logprobs.dim() == 2
    check.floating("logprobs", logprobs, (None, None) if two else (None,), logprobs)
    loss = known_loss(config)
    _check_entropy(entropy, logprobs, loss)
    with torch.autocast(logprobs.device.type, enabled=False):
        ids = torch.zeros_like(logprobs, dtype=torch.int64)
        known = prepare(logprobs, ids, loss, "reference", inputs)
        dtype = compute_dtype(logprobs)
        # where a look at old and reference log-probs is not free, a row with one that is not finite has id -1
        logp = torch.where(known.target_ids < 0, float("nan"), logprobs.reshape(-1).to(dtype))
        h = torch.zeros_like(logp) if entropy is None else entropy.reshape(-1).to(dtype)
        value, metrics = token_loss(logp, h, known, loss)
        if tokens:
            values, mean = token_values(logp, h, known, loss, logprobs.shape)
            metrics |= mean
    if entropy is None:
        unknown = {name: torch.full_like(x, float("nan")) for name, x in metrics.items() if "entropy" in name}
        metrics |= unknown
    if not tokens:
        return value, metrics
    if entropy is None:
        mask = known.mask.reshape(logprobs.shape)
        values = values._replace(entropy=torch.where(mask, float("nan"), values.entropy))
    return value, metrics, values


def _check_entropy(entropy: Tensor | None, logprobs: Tensor, loss: PolicyLoss) -> None:
    """One for each token, where the loss needs it."""
    if entropy is not None:
        check.floating("entropy", entropy, tuple(logprobs.shape), logprobs)
    elif loss.config.entropy_coef:
        raise ValueError(f"entropy: missing, with entropy_coef {loss.config.entropy_coef}")
    elif loss.uses_entropy:
        raise ValueError(
            f"entropy: missing, with type {loss.config.type!r}, whose term may read it; a class whose term does not "
            "says uses_entropy = False"
        )
