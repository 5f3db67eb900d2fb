"""The losses from log-probs: for a trainer that has computed those of the sampled tokens by itself.

The formula and its deviations are in token_loss.py. It is plain torch on vectors of T tokens, differentiable by
autograd, and what `grpo_loss(impl="reference")` computes once it has its log-probs.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.losses.base import PolicyLoss
from mgrpo.ops import check
from mgrpo.ops.grpo_loss import LossInputs, known_loss, prepare
from mgrpo.ops.selective_logprob import compute_dtype
from mgrpo.ops.token_loss import token_loss


def policy_loss(
    logprobs: Tensor,
    *,
    config: GrpoLossConfig,
    entropy: Tensor | None = None,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss 0-d, metrics) of T tokens in N trajectories whose log-probs are known.

    logprobs (T,): log pi(token) in nats under the policy that is trained, at the temperature of `config`, by which
    nothing is divided here. entropy (T,): of the policy at each token, in nats; needed with entropy_coef above 0 and by
    a loss of one's own whose `uses_entropy` is not False. inputs: the keyword arguments of `LossInputs`, as for
    `grpo_loss`.

    Returns the loss in float32 (float64 for float64 log-probs), differentiable in logprobs and entropy, and METRICS as
    0-d tensors on the same device, of which "entropy" is NaN where none was given. A token whose log-prob or entropy is
    not finite contributes nothing and is counted. torch.autocast changes nothing. Raises TypeError/ValueError naming
    the argument and the bound, and ConfigError for a loss that cannot be found.
    """
    check.floating("logprobs", logprobs, (None,), logprobs)
    loss = known_loss(config)
    _check_entropy(entropy, logprobs, loss)
    with torch.autocast(logprobs.device.type, enabled=False):
        ids = torch.zeros_like(logprobs, dtype=torch.int64)
        known = prepare(logprobs, ids, loss, "reference", inputs)
        dtype = compute_dtype(logprobs)
        # where a look at old and reference log-probs is not free, a row with one that is not finite has id -1
        logp = torch.where(known.target_ids < 0, float("nan"), logprobs.to(dtype))
        value, metrics = token_loss(
            logp, torch.zeros_like(logp) if entropy is None else entropy.to(dtype), known, loss
        )
    if entropy is None:
        metrics["entropy"] = torch.full_like(metrics["entropy"], float("nan"))
    return value, metrics


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
