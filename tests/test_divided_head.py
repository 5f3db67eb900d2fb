"""The vocabulary head divided among ranks with the same tokens: loss, metrics and gradients of one process, from a
share of its work."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mgrpo.model.policy import Policy
from mgrpo.ops.linear_grpo_loss import linear_grpo_loss
from mgrpo.ops.selective_logprob import selective_logprob
from mgrpo.trainers.torch.ranks import Ranks
from tests.divided_head_ranks import (
    DTYPES,
    POLICIES,
    RANKS,
    SIZES,
    batch_of,
    batches,
    operands,
    sizes_of,
    work_of,
)
from tests.loss_grid import settings
from tests.mesh_ranks import model_of
from tests.models import tiny_tokenizer
from tests.ranks import run_ranks

NEAR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}
"""Bound on what the cut changes, of the largest entry; with bfloat16 operands sums are float32."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks found, see tests/divided_head_ranks.py."""
    folder = tmp_path_factory.mktemp("divided")
    run_ranks("tests.divided_head_ranks", str(folder), size=RANKS)
    together: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    together["calls"] = [torch.load(folder / f"calls-{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return together


def check_close(got: torch.Tensor, whole: torch.Tensor, near: float, what: str) -> None:
    """Within `near` of the largest entry, and of the same dtype and shape."""
    assert got.dtype == whole.dtype and got.shape == whole.shape, what
    scale = float(whole.abs().max()) if whole.numel() else 0.0
    worst = float((got.double() - whole.double()).abs().max()) if whole.numel() else 0.0
    assert worst <= near * max(scale, 1e-3), f"{what}: off by {worst}, largest {scale}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_divided_head_is_the_whole_one(found: dict[str, Any], dtype: torch.dtype) -> None:
    """Groups of 2, 3 and 4, hidden states on all ranks or each on one; every loss, with and without old log-probs, from
    no token to 150, rows that are not finite: loss, metrics, d hidden, d weight and log-probs, on every rank."""
    for number, (name, data, loss, dtypes) in enumerate(batches()):
        if dtype not in dtypes:
            continue
        hidden, weight, rest = operands(data, dtype)
        value, metrics = linear_grpo_loss(hidden, weight, data["target_ids"], config=loss, **rest)
        grads = torch.autograd.grad(value * 0.5, (hidden, weight))
        logprobs = selective_logprob(hidden, weight, data["target_ids"])[0]
        finite = logprobs.isfinite()
        for size, way in itertools.product(sizes_of(number, name), ("tp", "cp")):
            for rank, calls in enumerate(found["calls"][:size]):
                own, own_metrics, *own_grads, own_logprobs, _ = calls[f"{size}/{way}/{dtype}/{name}"]
                what = f"{name}, {way}, rank {rank} of {size}"
                check_close(own, value.detach(), 10 * NEAR[dtype], f"loss, {what}")
                assert own_metrics.keys() == metrics.keys()
                for key, metric in metrics.items():
                    assert float(own_metrics[key]) == pytest.approx(float(metric), rel=1e-5, abs=1e-6), (
                        f"{key}, {what}"
                    )
                for part, got, whole in zip(("hidden", "weight"), own_grads, grads, strict=True):
                    check_close(got, whole, NEAR[dtype], f"d {part}, {what}")
                assert torch.equal(own_logprobs.isfinite(), finite)
                check_close(own_logprobs[finite], logprobs[finite], NEAR[dtype], f"log-probs, {what}")


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_multiplies_its_share(found: dict[str, Any], size: int) -> None:
    """Of T tokens that all act each rank of a tp group multiplies T / g, rounded, in the forward pass and for the
    log-probs; with a loss of two phases no more in the backward pass, where rows that the clip holds are left out."""
    for total in (37, 150):
        share = (total // size, -(-total // size))
        for name, times in ((f"{total} tokens", 2), (f"{total} tokens, gspo", 3)):
            every = [calls[f"{size}/tp/{torch.float32}/{name}"][-1] for calls in found["calls"][:size]]
            for rows in every:
                assert len(rows) == times and rows[0] in share and rows[-1] in share
                assert max(rows) <= share[1]
            assert sum(rows[0] for rows in every) == sum(rows[-1] for rows in every) == total
            assert 0 < sum(rows[1] for rows in every) <= total


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_step_multiplies_each_token_once(found: dict[str, Any], name: str, loss: str) -> None:
    """Learner, old log-probs and SFT on a mesh: the gradient and the numbers of one process, and the rows that reach
    the head of all ranks together are those of one process."""
    kind, more = POLICIES[name]
    every = found[f"{name}/{loss}"]
    same = 4 if more["mesh"].get("cp") == 4 else 2
    policy = Policy(model_of(kind), tiny_tokenizer(), kind)
    batch = batch_of(0, RANKS)  # all of them
    one = work_of(policy, batch, Ranks(), lambda grad: grad, settings(loss))
    for mine in every:
        for what, times in (("gradient", 1), ("demos gradient", RANKS // same)):
            scale = max(float(grad.abs().max()) for grad in one[what])
            for got, whole in zip(mine[what], one[what], strict=True):
                assert float((got - times * whole).abs().max()) < 1e-5 * scale, what
        assert mine["metrics"].keys() == one["metrics"].keys()
        for key, metric in one["metrics"].items():
            assert mine["metrics"][key] == pytest.approx(metric, rel=1e-4, abs=1e-5), key
    torch.testing.assert_close(every[0]["logprobs"], one["logprobs"], rtol=0, atol=1e-5)
    assert sum(mine["rows"] for mine in every) == one["rows"]
    for first in range(0, RANKS, same):
        group = every[first : first + same]
        rows = [mine["rows of log-probs"] for mine in group]
        assert sum(rows) == len(group[0]["logprobs"])
        assert all(torch.equal(mine["logprobs"], group[0]["logprobs"]) for mine in group)
        assert sum(mine["demos"] for mine in group) == pytest.approx(one["demos"], rel=1e-5)
        if "tp" in name:
            assert max(rows) - min(rows) <= 1
