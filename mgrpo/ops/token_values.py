"""What a loss call knows of each token, for those who ask for it with tokens=True."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgrpo.losses.base import PolicyLoss
from mgrpo.ops.token_loss import Tokens, clipped_rows, log_ratio_of


class TokenValues(NamedTuple):
    """Values of each token, of target_ids' shape, (T,) or (B, S), without a gradient; 0, 0, 1 and False where the mask
    is 0. A row whose log-prob is not finite has NaN, NaN, 1 and False."""

    logprobs: Tensor
    """log pi(token) in nats; float32, float64 for float64 input."""
    entropy: Tensor
    """Of the policy at this token, in nats."""
    ratio: Tensor
    """Importance ratio, of the trajectory where the loss's ratio is: exp(min(logprobs - old_logprobs,
    log_ratio_clip)); 1 without old_logprobs."""
    clipped: Tensor
    """bool: the loss's clip holds the ratio, at the bound that the sign of the advantage makes active."""


def token_values(
    logp: Tensor, entropy: Tensor, tokens: Tokens, loss: PolicyLoss, shape: torch.Size
) -> tuple[TokenValues, dict[str, Tensor]]:
    """(values, {"entropy_all": mean entropy over the rows under the mask}), from log-probs and entropies (T,) that are
    known for every row under the mask. shape: of the call's target_ids."""
    with torch.no_grad():
        logp, entropy, mask = logp.detach(), entropy.detach(), tokens.mask
        good = mask & logp.isfinite() & entropy.isfinite()
        base = logp if tokens.old_logprobs is None else tokens.old_logprobs.to(logp.dtype)
        log_ratio = log_ratio_of(torch.where(good, logp, 0.0), base, tokens, loss, good)
        ratio = log_ratio.clamp(max=loss.config.log_ratio_clip).exp()
        low, high = clipped_rows(ratio, tokens, loss)
        nan = torch.where(mask, float("nan"), 0.0).to(logp.dtype)
        values = TokenValues(
            torch.where(good, logp, nan).reshape(shape),
            torch.where(good, entropy, nan).reshape(shape),
            torch.where(good, ratio, 1.0).reshape(shape),
            (good & (low | high)).reshape(shape),
        )
        mean = torch.where(good, entropy, 0.0).sum() / good.sum().clamp(min=1)
    return values, {"entropy_all": mean}
