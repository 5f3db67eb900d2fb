"""With one agent and rollouts that weigh the same, the loss is plain GRPO: the formulas of TRL 1.16's trainer,
written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.ops.linear_grpo_loss import linear_grpo_loss

B, L, H, V = 6, 9, 16, 40
MAX_COMPLETION = 12


def case(seed: int) -> dict[str, Tensor]:
    """Hidden states, targets, masks and log-probs of B completions of up to L tokens, in float64."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, L, H, generator=g, dtype=torch.float64)
    weight = 0.5 * torch.randn(V, H, generator=g, dtype=torch.float64)
    ids = torch.randint(0, V, (B, L), generator=g)
    mask = (torch.rand(B, L, generator=g) < 0.7).double()
    mask[:, 0] = 1
    logp = torch.log_softmax(hidden @ weight.T, -1).gather(-1, ids[..., None])[..., 0]
    noise = 0.4 * torch.randn(2, B, L, generator=g, dtype=torch.float64)
    return {
        "hidden": hidden,
        "weight": weight,
        "ids": ids,
        "mask": mask,
        "old": logp + noise[0],
        "ref": logp + noise[1],
        "advantages": torch.randn(B, generator=g, dtype=torch.float64),
    }


def trl(c: dict[str, Tensor], config: GrpoLossConfig) -> Tensor:
    """GRPOTrainer._compute_loss for one device and no accumulation, in the notation used there."""
    logps = torch.log_softmax(c["hidden"] @ c["weight"].T / config.temperature, -1)
    logps = logps.gather(-1, c["ids"][..., None])[..., 0]
    mask, advantages = c["mask"], c["advantages"][:, None]
    log_ratio = logps - c["old"]
    if config.type == "gspo":  # importance_sampling_level="sequence" there
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    coef_1 = torch.exp(log_ratio)
    if config.type == "cispo":
        per_token = -torch.clamp(coef_1, max=config.clip_eps_high).detach() * advantages * logps
    elif config.type == "sapo":
        temperature = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
        gate = torch.sigmoid(temperature * (coef_1 - 1)) * 4 / temperature
        per_token = -gate * advantages
    else:
        coef_2 = torch.clamp(coef_1, 1 - config.clip_eps_low, 1 + config.clip_eps_high)
        if config.delta is not None:
            coef_1 = torch.clamp(coef_1, max=config.delta)
        per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if config.kl_coef:
        kl = torch.exp(c["ref"] - logps) - (c["ref"] - logps) - 1
        per_token = per_token + config.kl_coef * kl
    per_token = per_token.expand_as(mask)
    if config.type in ("grpo", "sapo", "gspo"):
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if config.type == "dr_grpo":
        return (per_token * mask).sum() / (B * MAX_COMPLETION)
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo")


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "delta"), [(t, None) for t in (*CLIPPED, "cispo", "sapo")] + [(t, 1.5) for t in CLIPPED]
)
def test_loss_and_gradient_are_trls(loss_type: str, kl_coef: float, delta: float | None) -> None:
    """Value and gradient agree to 1e-6 (they do to rounding) for every loss type, with and without KL and delta."""
    settings: dict[str, object] = {"type": loss_type, "delta": delta, "kl_coef": kl_coef}
    if loss_type == "dr_grpo":
        settings["max_completion_length"] = MAX_COMPLETION
    if loss_type != "sapo":
        settings["clip_eps_high"] = 2.0 if loss_type == "cispo" else 0.28
    config = GrpoLossConfig.model_validate(settings)
    c = case(seed=3)
    live = c["mask"] != 0
    counts = live.sum(1)
    mine, theirs = (c | {"hidden": c["hidden"].clone().requires_grad_()} for _ in range(2))
    loss, _ = linear_grpo_loss(
        mine["hidden"][live],
        mine["weight"],
        mine["ids"][live],
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        advantages=mine["advantages"],
        old_logprobs=mine["old"][live],
        ref_logprobs=mine["ref"][live] if kl_coef else None,
        config=config,
    )
    expected = trl(theirs, config)
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-6 * abs(expected.item())
    ours, reference = mine["hidden"].grad, theirs["hidden"].grad
    assert ours is not None and reference is not None
    assert float((ours - reference).abs().max()) <= 1e-6 * float(reference.abs().max())
