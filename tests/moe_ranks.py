"""What one of two ranks does in tests/test_moe.py: `python -m tests.moe_ranks FOLDER`. Rank 0 leaves what it found in
FOLDER/found.pt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, MeshConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, save_policy
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
# Mixtures whose rows two ranks divide between them, and those that need whole rows.
DIVIDED = ("Qwen3Moe", "Qwen2Moe", "Mixtral", "DeepseekV2", "DeepseekV3", "Olmoe", "MiniMaxM2", "Glm4Moe")
UNDIVIDED = ("GptOss", "Qwen3Next", "Lfm2Moe")


def moe_policy(config: PolicyConfig) -> Policy:
    """A tiny Qwen3-MoE whose routers prefer some of eight experts."""
    model = family("Qwen3Moe", num_experts=8, num_experts_per_tok=2, initializer_range=0.2)
    return Policy(model, tiny_tokenizer(), "moe", config)


def mixture(name: str, mesh: MeshConfig) -> Policy:
    """A tiny policy of the architecture, with the auxiliary loss."""
    model = family(name, vocab_size=104, initializer_range=0.2)
    return Policy(model, tiny_tokenizer(), name, PolicyConfig(aux_loss_coef=AUX, mesh=mesh))


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
    from mgrpo.trainers.torch.shard import load_sharded, whole_tensor
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
        for number, parts in enumerate(CUTS):
            start = moe_policy(PolicyConfig(aux_loss_coef=AUX, mesh=MeshConfig(cp=2)))
            policy = sharded(start, folder / f"cp-{number}", ranks)
            found[f"cp/{number}"] = step(policy, cut(rows_of(3, near=True), parts), ranks, whole_tensor)
        refused: dict[str, str] = {}
        for name in (*DIVIDED, *UNDIVIDED):
            start = mixture(name, MeshConfig(cp=2))
            if ranks.is_main:
                save_policy(start, folder / name)
            ranks.gather(None)
            try:
                policy = load_sharded(folder / name, start.config, ranks)
            except ConfigError as error:
                refused[name] = str(error)
                continue
            found[name] = step(policy, cut(rows_of(3, near=True), CUTS[1]), ranks, whole_tensor)
        if ranks.is_main:
            torch.save(refused, folder / "refused.pt")
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
