"""What other trainers compute from log-probs, written out from their formulas: TRL 1.16, verl 0.9.1, slime and
prime-rl. Everything is padded (B, S) and float64; `mask` is 1 at sampled tokens, advantages are (B, 1).

These are twins, not the packages. The tests of the adapters hold them to the real code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clipped(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    return (ref - logp).exp() - (ref - logp) - 1


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1): each row's mean over its sampled tokens."""
    return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def trl(logp: Tensor, x: dict[str, Tensor], kind: str, level: str, **more: Any) -> Tensor:
    """GRPOTrainer's loss of one micro-batch; more: delta, beta, bias, cap of cispo, the mode of the sampler's ratio."""
    mask, a = x["mask"], x["advantages"]
    gap = logp - x["old"]
    ratio = (gap if level == "token" else sequence_mean(gap, mask)).exp()
    if kind == "cispo":
        terms = -ratio.detach().clamp(max=more["cap"]) * a * logp
    elif kind == "sapo":
        tau = torch.full_like(a, 1.05).masked_fill(a > 0, 1.0)
        terms = -a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    else:
        held = ratio if more.get("delta") is None else ratio.clamp(max=more["delta"])
        terms = -torch.minimum(held * a, ratio.clamp(0.8, 1.28) * a)
    if mode := more.get("sampler"):
        rho = torch.nan_to_num((x["old"] - x["rollout"]) * mask, nan=0.0)
        rho = (rho if mode.startswith("token") else rho.sum(1, keepdim=True)).exp()
        outside = (rho < 0.5) | (rho > 2.0)
        terms = terms * (rho.clamp(max=2.0) if mode == "token_truncate" else rho.masked_fill(outside, 0.0))
    if beta := more.get("beta"):
        kl = k3(logp, x["ref"])
        terms = terms + beta * (kl * ratio if more.get("bias") else kl)
    if kind in ("grpo", "sapo"):
        return sequence_mean(terms, mask).mean()
    return (terms * mask).sum() / (len(mask) * 16 if kind == "dr_grpo" else mask.sum())


def verl(logp: Tensor, x: dict[str, Tensor], kind: str, mode: str) -> Tensor:
    """The registered losses vanilla, gspo and sapo: log-ratios in [-20, 20] (gspo: at most 10), dual clip at 3."""
    mask, a = x["mask"], x["advantages"]
    gap = logp - x["old"]
    if kind == "gspo":
        ratio = (logp - logp.detach() + sequence_mean(gap, mask).detach()).clamp(max=10).exp()
        terms = clipped(ratio, a, 0.2, 0.28)
    elif kind == "sapo":
        tau = torch.full_like(a, 1.05).masked_fill(a > 0, 1.0)
        terms = -a * torch.sigmoid(tau * (gap.clamp(-20, 20).exp() - 1)) * 4 / tau
    else:
        terms = clipped(gap.clamp(-20, 20).exp(), a, 0.2, 0.28)
        terms = torch.where(a < 0, torch.minimum(terms, -a * 3.0), terms)
    if mode == "token-mean":
        return (terms * mask).sum() / mask.sum()
    return sequence_mean(terms, mask).mean()


def slime(logp: Tensor, x: dict[str, Tensor], level: str, cap: float | None, beta: float) -> Tensor:
    """compute_policy_loss and the unbiased k3, over the reducer of sample means."""
    mask, a = x["mask"], x["advantages"]
    gap = logp - x["old"]
    terms = clipped((gap if level == "token" else sequence_mean(gap, mask)).exp(), a, 0.2, 0.28)
    if cap is not None:
        terms = torch.where(a < 0, torch.minimum(terms, -a * cap), terms)
    return sequence_mean(terms + beta * gap.exp() * k3(logp, x["ref"]), mask).mean()


def prime(logp: Tensor, x: dict[str, Tensor], tau: float) -> Tensor:
    """The default loss where its trust region keeps every token: a plain ratio and the squared log-ratio, both to the
    sampler; weights scale a token, and the divisor counts tokens."""
    gap = logp - x["old"]
    terms = x["weight"] * (-x["advantages"] * gap.exp() + tau * gap.square())
    return (terms * x["mask"]).sum() / x["mask"].sum()


def host_batch(seed: int, far: tuple[float, ...]) -> dict[str, Tensor]:
    """Six rows of up to nine tokens. Log-ratios are small, but for the last token of each row: those of `far` in
    turn."""
    g = torch.Generator().manual_seed(seed)
    b, s = 6, 9
    lengths = torch.tensor([9, 7, 5, 8, 6, 1])
    mask = (torch.arange(s) < lengths[:, None]).double()
    mask[0, 2:4] = 0.0
    logp = -torch.rand(b, s, generator=g, dtype=torch.float64) * 3 - 0.05
    noise = torch.randn(3, b, s, generator=g, dtype=torch.float64) * 0.4
    gaps = noise[0].clone()
    if far:
        gaps[torch.arange(b), lengths - 1] = torch.tensor([far[i % len(far)] for i in range(b)]).double()
    return {
        "logp": logp,
        "mask": mask,
        "old": logp - gaps,
        "ref": logp + noise[1],
        "rollout": logp - gaps + noise[2],
        "advantages": torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, -1.0]).double()[:, None],
        "weight": (torch.rand(b, 1, generator=g, dtype=torch.float64) + 0.5),
    }
