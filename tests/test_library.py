"""The ops as torch sees them: opcheck, one graph under torch.compile, no recompilation for another T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing

from mgrpo import GrpoLossConfig, grpo_loss, linear_grpo_loss
from mgrpo.ops import library, library_head
from mgrpo.ops.encoding import decode, encode
from mgrpo.ops.grpo_loss import LossInputs, known_loss, prepare
from mgrpo.ops.token_loss import METRICS, Tokens
from tests.loss_grid import grid_batch, head_batch, settings

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CONFIGS = (
    settings("dapo", kl_coef=0.1, entropy_coef=0.01, correction="mis", delta=2.0),
    settings("gspo"),
    settings("dr_grpo", correction="geometric", veto=1e-4, estimator="rloo"),
)


def tokens_of(data: dict[str, torch.Tensor], config: GrpoLossConfig, like: torch.Tensor) -> Tokens:
    rest = {k: v for k, v in data.items() if k not in ("logits", "hidden", "weight", "target_ids")}
    return prepare(like, data["target_ids"], known_loss(config), "cpu", LossInputs(**rest))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
def test_settings_survive_the_ops_encoding(config: GrpoLossConfig) -> None:
    """A config is the same after it went through an op as numbers."""
    assert decode(encode(config)).config == config


def test_opcheck_passes_for_every_op() -> None:
    """Schema, fake kernel, autograd registration and a traced forward and backward."""
    config = settings("dapo", kl_coef=0.1)
    data = grid_batch(33, torch.float32)
    logits = data["logits"].float()
    flat, numbers = library.flatten(tokens_of(data, config, logits)), encode(config)
    ids, active = data["target_ids"], torch.ones(19, dtype=torch.bool)
    head = head_batch(33, 8, torch.float32)
    h, w = head["hidden"].float().requires_grad_(), head["weight"].float().requires_grad_()
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (library.group_advantage, (torch.randn(6), torch.zeros(6).int(), None, "grpo", 1e-6, True, "cpu")),
        (library.row_logprob, (logits.clone().requires_grad_(), ids, active, 0.7, False, "cpu")),
        (library.grpo_loss, (logits.clone().requires_grad_(), *flat, numbers, True, "cpu")),
        (library.grpo_loss_, (logits.clone(), *flat, numbers, "cpu")),
        (library_head.linear_logprob, (h, w, ids, active, 0.7, 5, "cpu")),
        (library_head.linear_grpo_loss, (h, w, *flat, numbers, 5, [True, True], "cpu")),
    ]
    for op, args in cases:
        torch.library.opcheck(op, args, test_utils=CHECKS)


def test_one_graph_serves_every_number_of_tokens() -> None:
    """fullgraph=True holds for one-phase and two-phase losses, equals eager bit for bit, and T may change."""
    for config in CONFIGS:
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()

        def step(hidden: torch.Tensor, weight: torch.Tensor, rest: dict[str, Any], c: GrpoLossConfig) -> Any:
            return linear_grpo_loss(hidden, weight, rest.pop("target_ids"), config=c, impl="cpu", **rest)

        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
        data = head_batch(65, 8, torch.float32)
        graphs = 0
        for rows in (19, 15, 10):
            cut = {k: (v[:rows] if v.shape[0] == 19 else v).clone() for k, v in data.items()}
            cut["cu_seqlens"] = data["cu_seqlens"].clamp(max=rows)
            got, want = [], []
            for run, into in ((compiled, got), (step, want)):
                leaves = [cut[k].float().requires_grad_() for k in ("hidden", "weight")]
                rest = {k: v for k, v in cut.items() if k not in ("hidden", "weight")}
                loss, metrics = run(*leaves, rest, config)
                into += [loss.detach(), *torch.autograd.grad(loss * 0.5, leaves)]
                into += [metrics[name] for name in METRICS]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


def test_the_loss_from_logits_compiles() -> None:
    """grpo_loss in one graph too, in place as well, with rewards reduced inside the graph."""
    data = grid_batch(65, torch.float32)
    data.pop("advantages")
    rest = {k: v for k, v in data.items() if k != "logits"}
    rest |= {"rewards": torch.arange(6.0), "group_id": torch.tensor([0, 0, 1, 1, 1, 0], dtype=torch.int32)}
    torch._dynamo.reset()
    results = []
    for inplace in (False, True):

        def step(z: torch.Tensor, inplace: bool = inplace) -> Any:
            more = dict(rest)
            ids = more.pop("target_ids")
            return grpo_loss(z * 1.0, ids, config=CONFIGS[0], inplace=inplace, impl="cpu", **more)

        for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            leaf = data["logits"].float().requires_grad_()
            loss, _ = run(leaf)
            results.append((loss.detach(), *torch.autograd.grad(loss * 0.5, leaf)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
