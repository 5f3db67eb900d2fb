"""What one of two ranks does in tests/test_fsdp.py: `python -m tests.fsdp_ranks FOLDER`, started once for all tests.

Rank 0 leaves what it found in FOLDER/found.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgrpo.config import RunConfig, load_config, view_of
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.model.policy import Policy
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.models import tiny_model, tiny_policy, tiny_tokenizer
from tests.rows import ROWS, rows_of
from tests.runs import RELAY
from tests.shared_kit import forest, micro_batch, pieces, policies, sampled_near

STEPS, MIDDLE = 5, 2
TOKENS = 80  # of the tokenizer of a padded head
CUTS = ([range(ROWS)], [range(3), range(3, ROWS)], [[0], [1, 9], [2, 3, 4], [5, 8], [6, 7]])

# What is trained -> (kind of model, overrides of agents.main)
VARIANTS: dict[str, tuple[str, Sequence[str]]] = {
    "tied": ("shift", ()),
    "untied": ("llama", ()),
    "reference": ("shift", ("loss.kl_coef=0.1",)),
    "sequences": ("llama", ('loss.type="gspo"', 'policy.attention="varlen"')),
    "own": ("shift", ('loss.type="tests.own_losses:OwnGrpo"', "loss.options.high=0.3")),
    "adapters": ("llama", ("policy.lora.rank=4", "loss.kl_coef=0.1")),
    "half": ("llama", ('policy.dtype="bfloat16"', "policy.gradient_checkpointing=true")),
    "half tied": ("shift", ('policy.dtype="bfloat16"',)),
    "last": ("llama", ("policy.last_layers=1", 'policy.dtype="bfloat16"')),
}


def config_of(variant: str, ranks: int) -> RunConfig:
    sets = [f"agents.main.{part}" for part in VARIANTS[variant][1]]
    return load_config(RELAY, [*sets, f"agents.main.policy.ranks={ranks}", "trainer.keep_checkpoints=9"])


def start_of(folder: Path, variant: str) -> Path:
    return folder / VARIANTS[variant][0]


def cut(rows: MicroBatch, parts: Sequence[Sequence[int]], size: int) -> MiniBatch:
    """The rows in micro-batches, filled up with empty ones to a multiple of the ranks, as the batcher does."""
    micro = [rows.rows(torch.isin(torch.arange(ROWS), torch.tensor(list(part)))) for part in parts]
    micro += [rows.rows(torch.zeros(ROWS, dtype=torch.bool))] * (-len(micro) % size)
    return MiniBatch(micro, float(rows.weights.sum()))


def batches_of(step: int) -> list[MiniBatch]:
    """The minibatches of a step: an uneven cut, one micro-batch for two ranks, and one in which nothing can act."""
    idle = rows_of(100 + step, near=True)
    idle.advantages.zero_()
    return [
        cut(rows_of(10 * step, near=True), CUTS[2], 2),
        cut(rows_of(10 * step + 1, near=True), CUTS[0], 2),
        cut(idle, CUTS[1], 2),
    ]


def padded(kind: str) -> tuple[Policy, MiniBatch]:
    """A policy whose head has more rows than its tokenizer has tokens, and rows of its tokens."""
    policy = Policy(tiny_model(kind), tiny_tokenizer(TOKENS), kind)  # type: ignore[arg-type]
    rows = rows_of(1, near=True)
    rows.ids.remainder_(TOKENS)
    return policy, cut(rows, CUTS[1], 2)


def prefixed() -> tuple[Policy, MicroBatch]:
    """A policy that computes shared prefixes once, and rows of three trees."""
    plain, shared = policies("llama, grouped heads")
    g = np.random.default_rng(0)
    tokens = [row for seed in range(3) for row in forest(seed)[0]]
    return shared, sampled_near(plain, micro_batch(tokens, g), g)


def prefixed_batch(rows: MicroBatch, number: int) -> MiniBatch:
    """One tree a micro-batch, the third on the first rank again and an empty one on the second; or trees cut apart."""
    count = len(rows.lengths)
    parts = ([range(11), range(11, 22), range(22, count)], [range(7), range(7, count)])[number]
    empty: list[Sequence[int]] = [[]] * (-len(parts) % 2)
    return MiniBatch(pieces(rows, [*parts, *empty]), float(rows.weights.sum()))


def weights(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.weights()}


def train(trainer: TorchTrainer, start: Path, last: int = STEPS, save: bool = False) -> dict[str, Any]:
    """From where the trainer's checkpoint stands up to `last`: metrics of each step, weights before and after all."""
    checkpoint = trainer.load(start)
    step = checkpoint.step if checkpoint else 0
    found: dict[str, Any] = {"from": step, "before": weights(trainer), "metrics": [], "costs": []}
    while step < last:
        found["metrics"].append(trainer.train(batches_of(step), recompute_old=step % 2 == 1))
        cost = trainer.cost()
        assert cost is not None
        found["costs"].append((cost.flops, cost.peak_memory))
        step += 1
        if save and step == MIDDLE:
            trainer.save(step)  # written while the next steps are taken
    trainer.saved(wait=True)
    return found | {"after": weights(trainer)}


def gradient(
    policy: Policy, batch: MiniBatch, ranks: Ranks, whole: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """The gradient that reaches the optimizer, clipping aside."""
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(whole(p.grad).clone() for p in policy.parameters() if p.grad is not None)
    )
    learner = Learner(policy, optimizer, GrpoLossConfig(), 1e9, ranks=ranks)
    learner.step(batch.shard(ranks.rank, ranks.size))
    return seen


def main(folder: Path) -> None:
    from mgrpo.trainers.torch.shard import whole_tensor
    from tests.sharded import sharded

    with Ranks(2) as ranks:
        found: dict[str, Any] = {}
        # (name, variant, folder of the checkpoints, does it write one)
        lives = [(f"run/{v}", v, f"two/{v}", True) for v in VARIANTS]
        lives += [(f"resumed/{v}", v, f"two/{v}", False) for v in VARIANTS]
        lives += [(f"from one/{v}", v, f"one/{v}", False) for v in VARIANTS]
        for name, variant, place, save in lives:
            trainer = TorchTrainer(view_of(config_of(variant, 2), "main"), folder / place, ranks)
            if ranks.is_main:
                found[name] = train(trainer, start_of(folder, variant), save=save)
                trainer.close()
            else:
                trainer.run_commands()
        for kind in ("shift", "llama"):
            for number, parts in enumerate(CUTS):
                place = folder / "sharded" / f"{kind}-{number}"
                policy = sharded(tiny_policy(kind), place, ranks)  # type: ignore[arg-type]
                batch = cut(rows_of(1, near=True), parts, 2)
                found[f"gradient/{kind}/{number}"] = gradient(policy, batch, ranks, whole_tensor)
            policy, batch = padded(kind)
            policy = sharded(policy, folder / "sharded" / kind, ranks)
            found[f"gradient/{kind}/padded"] = gradient(policy, batch, ranks, whole_tensor)
        for number in range(2):
            policy, rows = prefixed()
            policy = sharded(policy, folder / "sharded" / f"prefixes-{number}", ranks)
            assert policy.shares, policy.why_not
            batch = prefixed_batch(rows, number)
            found[f"gradient/prefixes/{number}"] = gradient(policy, batch, ranks, whole_tensor)
        if ranks.is_main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
