"""What one of two ranks does in tests/test_moe.py: `python -m tests.moe_ranks FOLDER`. Rank 0 leaves what it found in
FOLDER/found.pt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.model.policy import Policy
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner
from mgrpo.trainers.torch.ranks import Ranks
from tests.families import family
from tests.models import tiny_tokenizer
from tests.rows import ROWS, rows_of

AUX = 0.25
CUTS = ([range(ROWS)], [range(3), range(3, ROWS)], [[0], [1, 9], [2, 3, 4], [5, 8], [6, 7]])


_FUSED = LoraConfig(rank=2, targets=("o_proj", "experts.gate_up_proj", "experts.down_proj"))
OTHERS = {
    "adapters": PolicyConfig(lora=_FUSED),
    "adapters, half": PolicyConfig(
        lora=_FUSED, dtype="bfloat16", aux_loss_coef=AUX, gradient_checkpointing=True
    ),
    "half": PolicyConfig(dtype="bfloat16", aux_loss_coef=AUX, gradient_checkpointing=True),
}


def moe_policy(config: PolicyConfig) -> Policy:
    """A tiny Qwen3-MoE whose routers prefer some of eight experts."""
    model = family("Qwen3Moe", num_experts=8, num_experts_per_tok=2, initializer_range=0.2)
    return Policy(model, tiny_tokenizer(), "moe", config)


def cut(rows: MicroBatch, parts: Sequence[Sequence[int]], size: int = 1) -> MiniBatch:
    """The rows in micro-batches, filled up with empty ones to a multiple of the ranks, as the batcher does."""
    micro = [rows.rows(torch.isin(torch.arange(ROWS), torch.tensor(list(part)))) for part in parts]
    micro += [rows.rows(torch.zeros(ROWS, dtype=torch.bool))] * (-len(micro) % size)
    return MiniBatch(micro, float(rows.weights.sum()))


def step(
    policy: Policy,
    batch: MiniBatch,
    ranks: Ranks | None = None,
    whole: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> tuple[dict[str, float], list[Tensor]]:
    """Metrics of an optimizer step, and the gradient that reached the optimizer, clipping aside."""
    seen: list[Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(
            whole(p.grad).clone() if p.grad is not None else torch.zeros_like(p) for p in policy.parameters()
        )
    )
    learner = Learner(policy, optimizer, GrpoLossConfig(), 1e9, ranks=ranks)
    return learner.train([batch], recompute_old=False), seen


def main(folder: Path) -> None:
    from mgrpo.trainers.torch.shard import whole_tensor
    from tests.sharded import sharded

    with Ranks(2) as ranks:
        found = {}
        for aux in (0.0, AUX):
            for number, parts in enumerate(CUTS):
                start = moe_policy(PolicyConfig(aux_loss_coef=aux))
                policy = sharded(start, folder / f"{aux}-{number}", ranks)
                batch = cut(rows_of(3, near=True), parts, 2).shard(ranks.rank, 2)
                found[f"{aux}/{number}"] = step(policy, batch, ranks, whole_tensor)
        for name, config in OTHERS.items():
            policy = sharded(moe_policy(config), folder / name, ranks)
            batch = cut(rows_of(3, near=True), CUTS[1], 2).shard(ranks.rank, 2)
            found[name] = step(policy, batch, ranks, whole_tensor)
        if ranks.is_main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
