"""Speed of a step on two clocks: products, tokens and memory over seconds, and nothing that is not known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mgrpo.config import view_of
from mgrpo.model.policy import save_policy
from mgrpo.pipeline.step_perf import step_perf, trained_tokens
from mgrpo.profiling.flops import flops_of
from mgrpo.trainers.base import StepCost
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.cost import of_rows
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.fsdp_ranks import batches_of, config_of
from tests.models import tiny_policy
from tests.rows import rows_of


def batch_of(tokens: float, seed: int, shared: int = 0) -> Any:
    return SimpleNamespace(
        metrics={"tokens": tokens},
        minibatches=[MiniBatch([rows_of(seed), rows_of(seed + 1)], 1.0)],
        plans=[SimpleNamespace(shared_tokens=shared)],
    )


def test_two_clocks() -> None:
    """4 seconds of training in a step of 10: the wall's figures are 0.4 of the compute's, of all roles' tokens."""
    batches = [batch_of(100.0, 0), batch_of(60.0, 2)]
    found = step_perf(StepCost(6e12, 3e12, 2.5e9), batches, train=4.0, step=10.0)
    assert found["perf/mfu"] == pytest.approx(0.5) and found["perf/mfu_wall"] == pytest.approx(0.2)
    assert found["perf/tok_per_s"] == 40.0 and found["perf/tok_per_s_wall"] == 16.0
    trained = sum(trained_tokens(rows_of(seed)) for seed in range(4))
    assert found["perf/trained_tok_per_s"] == trained / 4.0
    assert found["perf/trained_tok_per_s_wall"] == trained / 10.0
    assert found["perf/tflops"] == 1.5 and found["perf/peak_mem_gb"] == 2.5


def test_shared_tokens_are_those_of_all_roles() -> None:
    """Of the tokens that enter the model, one less a row: their number and their share, and 0 where there is none."""
    found = step_perf(None, [batch_of(100.0, 0, shared=7), batch_of(60.0, 2, shared=4)], train=4.0, step=10.0)
    entering = sum(int(n) - 1 for seed in range(4) for n in rows_of(seed).lengths)
    assert found["perf/shared_tokens"] == 11.0 and found["perf/shared"] == 11 / entering
    assert step_perf(None, [batch_of(100.0, 0)], 4.0, 10.0)["perf/shared"] == 0.0
    empty = SimpleNamespace(metrics={}, minibatches=[], plans=[])
    assert step_perf(None, [empty], 4.0, 10.0)["perf/shared"] == 0.0  # type: ignore[list-item]


@pytest.mark.parametrize(
    "cost",
    [None, *(StepCost(6e12, peak, 1e9) for peak in (math.nan, 0.0)), StepCost(math.nan, 3e12, 1e9)],
)
def test_what_is_not_known_is_not_shown(cost: StepCost | None) -> None:
    """No peak, no FLOPs or neither: no utilisation, and every figure that is left is finite."""
    found = step_perf(cost, [batch_of(100.0, 0)], train=4.0, step=10.0)
    assert not {name for name in found if "mfu" in name}
    assert ("perf/tflops" in found) == (cost is not None and math.isfinite(cost.flops))
    assert ("perf/peak_mem_gb" in found) == (cost is not None)
    assert found["perf/tok_per_s"] == 25.0 and all(map(math.isfinite, found.values()))


def test_only_sampled_tokens_that_act_are_trained() -> None:
    """One by one: of rows without an advantage none, of token advantages those other than 0."""
    rows = rows_of(0)
    by_hand = sum(
        int(rows.loss_mask[r, t])
        for r in range(rows.ids.shape[0])
        if rows.advantages[r]
        for t in range(rows.ids.shape[1])
    )
    assert trained_tokens(rows) == by_hand > 0
    rows.token_advantages = torch.zeros(rows.ids.shape)
    assert trained_tokens(rows) == 0
    rows.token_advantages[:, 2] = -1.0
    assert trained_tokens(rows) == int(rows.loss_mask[:, 2].sum()) > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_the_torch_trainer_knows_what_its_step_cost(tmp_path: Path, recompute: bool) -> None:
    """FLOPs of the rows that are computed, the memory of this process, and no peak on a CPU. Before the first step
    nothing is known."""
    policy = tiny_policy("llama")
    save_policy(policy, tmp_path / "start")
    view = view_of(config_of("untied", 1), "main")
    with TorchTrainer.open(view, tmp_path / "run") as trainer:
        trainer.load(tmp_path / "start")
        assert trainer.cost() is None
        batches = batches_of(0)
        trainer.train(batches, recompute_old=recompute)
        cost = trainer.cost()
        trainer.close()
    model = flops_of(policy.model.config)[0]
    micro = [m for batch in batches for m in batch.micro]
    expected = sum(of_rows(model, m.rows(m.with_advantage())).total for m in micro)
    expected += sum(of_rows(model, m).forward for m in micro) if recompute else 0.0
    assert cost is not None and cost.flops == pytest.approx(expected)
    assert math.isnan(cost.peak_flops)
    assert 1e7 < cost.peak_memory < 1e12
