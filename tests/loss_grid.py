"""The correctness grid of the loss, shared by the backends' tests: one batch whose tokens are the grid's
points."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import torch

from mgrpo import GrpoLossConfig, grpo_loss, linear_grpo_loss
from mgrpo.config.loss import Correction, KlEstimator
from mgrpo.losses.builtin import KINDS

LOSS_TYPES = tuple(KINDS)
CLIPPED = tuple(name for name, kind in KINDS.items() if kind.fused_id == 0)
RATIOS = (0.7, 1.05, 1.2, 1.5, 3.0)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
"""Bound on max |gradient - float64's| / max |float64's|."""


def settings(loss_type: str, **more: Any) -> GrpoLossConfig:
    if loss_type == "dr_grpo":
        more["max_completion_length"] = 16
    if loss_type != "sapo":  # no ratio of the grid sits on a bound
        more.setdefault("clip_eps_high", 0.28)
    return GrpoLossConfig.model_validate({"type": loss_type, **more})


def configs() -> list[GrpoLossConfig]:
    """Loss types x ratio level x delta, then the other terms one at a time."""
    out = []
    for loss_type, level in itertools.product(LOSS_TYPES, ("token", "sequence")):
        if (loss_type, level) == ("gspo", "token"):
            continue
        deltas = (None,) if loss_type in ("cispo", "sapo") else (None, 1.1, 2.0)
        out += [settings(loss_type, ratio_level=level, delta=d) for d in deltas]
    out += [settings("dapo", kl_coef=0.1, kl_estimator=k) for k in get_args(KlEstimator)]
    out += [
        settings(t, ratio_level=level, kl_coef=0.1, kl_bias_correction=True, kl_estimator=k)
        for t, level, k in (("dapo", "token", "k3"), ("cispo", "token", "k2"), ("grpo", "sequence", "k3"))
    ]
    out += [settings("grpo", entropy_coef=0.02, temperature=t) for t in (0.6, 1.3)]
    corrections = [c for c in get_args(Correction) if c != "none"]
    out += [settings("grpo", correction=c, correction_high=2.5, veto=1e-4) for c in corrections]
    return out


def grid_batch(vocabulary: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Logits (T, V) rounded to `dtype` and what belongs to them, old log-probs set for the grid's ratios.

    Trajectories: every ratio with A = +1, every ratio with A = -1, one masked whole, one of a single token (A
    = 1), one of advantage 0; then a trajectory of -inf rows: a single -inf, a leading block of -inf, all but
    the target -inf.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = [len(RATIOS), len(RATIOS), 3, 1, 2, 3]
    rows = sum(lengths)
    logits = torch.randn(rows, vocabulary, generator=g, dtype=torch.float64) * 2.0
    ids = torch.randint(vocabulary // 2, vocabulary, (rows,), generator=g)
    logits[rows - 3, 1] = -float("inf")
    logits[rows - 2, : vocabulary // 2] = -float("inf")
    last = logits[rows - 1].clone()
    logits[rows - 1] = -float("inf")
    logits[rows - 1, ids[-1]] = last[ids[-1]]
    logits = logits.to(dtype).double()
    logp = logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
    ratio = torch.tensor([*RATIOS, *RATIOS, *[1.05] * (rows - 2 * len(RATIOS))], dtype=torch.float64)
    mask = torch.ones(rows, dtype=torch.uint8)
    mask[2 * len(RATIOS) : 2 * len(RATIOS) + 3] = 0
    noise = torch.randn(2, rows, generator=g, dtype=torch.float64) * 0.3
    return {
        "logits": logits,
        "target_ids": ids,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "loss_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, -1.0]),
        "seq_weight": torch.tensor([1.0, 0.5, 1.0, 0.25, 1.0, 1.0]),
        "old_logprobs": (logp - ratio.log()).float(),
        "ref_logprobs": (logp + noise[0]).float(),
        "rollout_logprobs": (logp - ratio.log() + noise[1]).float(),
    }


def run_logits(
    data: dict[str, torch.Tensor], config: GrpoLossConfig, dtype: torch.dtype, impl: str, **more: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """(loss, metrics, 0.5 d loss / d logits): the upstream gradient is 0.5."""
    leaf = data["logits"].to(dtype).clone().requires_grad_()
    rest = {k: v for k, v in data.items() if k not in ("logits", "target_ids")} | more
    # An in-place op needs a tensor that autograd made: the leaf's own values stay.
    z = leaf.clone() if rest.get("inplace") else leaf
    loss, metrics = grpo_loss(z, data["target_ids"], config=config, impl=impl, **rest)
    (grad,) = torch.autograd.grad(loss * 0.5, leaf)
    return loss.detach(), metrics, grad


def run_head(
    data: dict[str, torch.Tensor], config: GrpoLossConfig, dtype: torch.dtype, impl: str, **more: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """(loss, metrics, d hidden, d weight) at upstream 0.5; data holds hidden and weight instead of logits."""
    leaves = [data[k].to(dtype).clone().requires_grad_() for k in ("hidden", "weight")]
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")} | more
    loss, metrics = linear_grpo_loss(*leaves, data["target_ids"], config=config, impl=impl, **rest)
    grads = torch.autograd.grad(loss * 0.5, leaves)
    return loss.detach(), metrics, grads[0], grads[1]


def head_batch(vocabulary: int, width: int, dtype: torch.dtype, seed: int = 1) -> dict[str, torch.Tensor]:
    """hidden (T, H) and weight (V, H) rounded to `dtype` with the grid's trajectories, ratios and masks."""
    data = grid_batch(vocabulary, torch.float64, seed)
    g = torch.Generator().manual_seed(seed)
    rows = data["target_ids"].numel()
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).double()
    weight = (torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * 0.3).to(dtype).double()
    before = data.pop("logits").log_softmax(1).gather(1, data["target_ids"][:, None]).squeeze(1)
    after = (hidden @ weight.t()).log_softmax(1).gather(1, data["target_ids"][:, None]).squeeze(1)
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        data[name] = (data[name].double() - before + after).float()
    return data | {"hidden": hidden, "weight": weight}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """max |got - exact| / max |exact|; 0 for an exact gradient that is all 0 and was met."""
    scale = float(exact.abs().max())
    worst = float((got.double() - exact.double()).abs().max())
    return worst if scale == 0 else worst / scale


def rms_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """sqrt(mean (got - exact)^2 / mean exact^2), which one lucky or unlucky rounding does not move."""
    off = (got.double() - exact.double()).square().mean().sqrt()
    return float(off / exact.double().square().mean().sqrt())
