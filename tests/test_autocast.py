"""Inside torch.autocast the loss ops compute as outside of it: forward and backward, every op and backend."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mgrpo import GrpoLossConfig, grpo_loss, linear_grpo_loss, selective_logprob
from mgrpo.ops.token_loss import METRICS
from tests.loss_grid import head_batch, settings

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIGS = (
    settings("dapo", kl_coef=0.1, entropy_coef=0.02),
    settings("gspo"),
    settings("grpo", correction="mis"),
)


def run(
    op: str, config: GrpoLossConfig, dtype: torch.dtype, impl: str, forward: bool, backward: bool
) -> list[torch.Tensor]:
    """Everything a call returns and its gradients; forward, backward: which of the two is under autocast."""

    def context(on: bool) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

    data = head_batch(129, 24, dtype)
    ids = data["target_ids"]
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
    leaves = [data[k].to(dtype).requires_grad_() for k in ("hidden", "weight")]
    if op == "grpo_loss":
        leaves = [(data["hidden"] @ data["weight"].t()).to(dtype).requires_grad_()]
    with context(forward):
        if op == "selective_logprob":
            return list(selective_logprob(*leaves, ids, impl=impl, chunk=5))
        if op == "linear_grpo_loss":
            out = linear_grpo_loss(*leaves, ids, config=config, impl=impl, tokens=True, **rest)
        else:
            out = grpo_loss(leaves[0], ids, config=config, impl=impl, tokens=True, **rest)
    loss, metrics, values = out
    with context(backward):
        grads = torch.autograd.grad(loss * 0.5, leaves)
    return [loss.detach(), *(metrics[k] for k in METRICS), *values, *grads]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("op", ["linear_grpo_loss", "grpo_loss", "selective_logprob"])
def test_autocast_changes_no_bit(op: str, dtype: str, impl: str) -> None:
    """Autocast around the forward pass, around the backward pass and around both."""
    for config in CONFIGS:
        plain = run(op, config, DTYPES[dtype], impl, False, False)
        for forward, backward in ((True, False), (False, True), (True, True)):
            found = run(op, config, DTYPES[dtype], impl, forward, backward)
            for a, b in zip(plain, found, strict=True):
                assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_a_float32_head_beside_autocasts_hidden_states() -> None:
    """What a model under autocast hands over: bfloat16 hidden states and a float32 weight; a float32 product that
    autocast would round gives the float32 loss."""
    data = head_batch(129, 24, torch.float32)
    ids = data["target_ids"]
    rest = {k: v for k, v in data.items() if k not in ("hidden", "weight", "target_ids")}
    h, w = data["hidden"].float(), data["weight"].float()
    with torch.autocast("cpu", torch.bfloat16):
        layer = torch.eye(24)
        states = h @ layer
        assert states.dtype == torch.bfloat16
        mixed, _ = linear_grpo_loss(states, w, ids, config=CONFIGS[0], **rest)
        wide, _ = linear_grpo_loss(h, w, ids, config=CONFIGS[0], **rest)
    alone, _ = linear_grpo_loss(h.bfloat16(), w, ids, config=CONFIGS[0], **rest)
    assert torch.equal(mixed, alone) and not torch.equal(mixed, wide)
