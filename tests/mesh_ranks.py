"""What one of four ranks does in tests/test_mesh.py: `python -m tests.mesh_ranks FOLDER`, started once for all tests.

Rank 0 leaves what it found in FOLDER/found.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgrpo.config import RunConfig, load_config, view_of
from mgrpo.config.run import SftConfig
from mgrpo.model.policy import Policy
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.base import Demos
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.fsdp_ranks import CUTS, cut, weights
from tests.mesh_gradient import MESHES, on_a_mesh
from tests.models import tiny_tokenizer
from tests.rows import routed, rows_of
from tests.runs import RELAY

RANKS, STEPS, MIDDLE = 4, 3, 1
RUN = ("agents.main.optimizer.lr=3e-4", "trainer.keep_checkpoints=9")

# What is cut how -> (kind of model, overrides of agents.main.policy beside the mesh, the mesh)
VARIANTS: dict[str, tuple[str, Sequence[str], str]] = {
    "dp": ("llama", (), ""),
    "hsdp": ("llama", ("share_prefixes=false",), "replicate = 2, dp = 2"),
    "tp": ("llama", (), "dp = 2, tp = 2"),
    "tied": ("qwen3", ('attention="varlen"',), "dp = 2, tp = 2"),
    "frozen": ("qwen3", ("last_layers=1", "gradient_checkpointing=true"), "tp = 2"),
    "ep": ("qwen3_moe", ("aux_loss_coef=0.1",), "ep = 4"),
    "tp and ep": (
        "qwen3_moe",
        ("gradient_checkpointing=true", "aux_loss_coef=0.1"),
        "dp = 2, tp = 2, ep = 2",
    ),
    "replay": (
        "qwen3_moe",
        ("routing_replay=true", "gradient_checkpointing=true"),
        "dp = 2, tp = 2, ep = 4",
    ),
    "cp": ("llama", (), "dp = 2, cp = 2"),
    "cp tied": ("qwen3", ("last_layers=1", "gradient_checkpointing=true"), "cp = 4"),
    "cp adapters": ("qwen3", ("lora.rank=4",), "replicate = 2, cp = 2"),
    "cp moe": ("qwen3_moe", ("aux_loss_coef=0.1",), "dp = 2, cp = 2"),
    "cp ep": (
        "qwen3_moe",
        ("gradient_checkpointing=true", "aux_loss_coef=0.1"),
        "dp = 2, cp = 2, ep = 4",
    ),
    "cp replay": ("qwen3_moe", ("routing_replay=true",), "dp = 2, cp = 2"),
    "cp tp": ("llama", (), "cp = 2, tp = 2"),
    "cp tp ep": ("qwen3_moe", ("aux_loss_coef=0.1",), "cp = 2, tp = 2, ep = 2"),
    "half": ("qwen3_moe", ('dtype="bfloat16"',), "dp = 2, tp = 2, ep = 4"),
    "adapters": ("qwen3_moe", ("lora.rank=4", 'lora.targets=["q_proj", "o_proj"]'), "ep = 2"),
}

RESUMED = (
    "tp",
    "frozen",
    "tp and ep",
    "cp",
    "cp ep",
    "half",
    "adapters",
)  # those that resume one process's, and are resumed
LATER = (
    "cp tp",
)  # those that go on from one process's middle alone, where a KL term of tp is more than rounding


def model_of(kind: str) -> Any:
    """Two layers, random weights; a vocabulary with three rows that are no tokens."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True)).eval()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).eval()


def policy_of(kind: str) -> Policy:
    return Policy(model_of(kind), tiny_tokenizer(), kind)


def config_of(variant: str, ranks: int) -> RunConfig:
    """ranks: as many as the variant's mesh has, or 1 for the same without a mesh."""
    _, overrides, mesh = VARIANTS[variant]
    sets = [f"policy.{part}" for part in overrides]
    sets += [f"policy.ranks={ranks}"]
    sets += [f"policy.mesh={{ {mesh} }}"] if mesh and ranks > 1 else []
    # The first KL term is 0 but for rounding, which AdamW makes steps of where a cut rounds otherwise: not with tp
    # (but LATER), nor where rows are packed on several ranks alone, as with share_prefixes.
    sets += ["loss.kl_coef=0.1"] if variant in ("hsdp", "adapters", "cp", "cp adapters", "cp tp") else []
    sets += ['loss.type="gspo"'] if variant in ("tied", "cp") else []
    return load_config(RELAY, [*(f"agents.main.{part}" for part in sets), *RUN])


def batches_of(step: int) -> list[MiniBatch]:
    """The minibatches of a step: an uneven cut, some ranks without rows, and one that all but one rank sit out. Rows
    say which experts of the mixture their tokens were sent to."""
    return [
        cut(routed(rows_of(10 * step, near=True), 2, 4, 2), CUTS[2], RANKS),
        cut(routed(rows_of(10 * step + 1, near=True), 2, 4, 2), CUTS[0], RANKS),
    ]


def first_batches() -> list[MiniBatch]:
    """Whose gradients tests/mesh_gradient.py takes."""
    return [batches_of(step)[0] for step in range(6)]


def train(trainer: TorchTrainer, start: Path, save: bool = False) -> dict[str, Any]:
    """From where the trainer's checkpoint stands to the last step: metrics of each, weights before and after all."""
    checkpoint = trainer.load(start)
    step = checkpoint.step if checkpoint else 0
    found: dict[str, Any] = {"from": step, "before": weights(trainer), "metrics": []}
    while step < STEPS:
        found["metrics"].append(trainer.train(batches_of(step), recompute_old=step % 2 == 1))
        step += 1
        if save and step == MIDDLE:
            trainer.save(step)
    trainer.saved(wait=True)
    probe = trainer.probe()
    assert probe is not None
    return found | {"after": weights(trainer), "probe": torch.tensor(probe.logprobs)}


def learn_demos(trainer: TorchTrainer, fresh: Path, start: Path) -> None:
    """Three supervised steps from the policy in `fresh` to one in `start`."""

    def demos(step: int) -> Demos:
        rows = rows_of(step)
        return [
            (ids[:length].numpy().astype(np.int32), mask[:length].numpy().astype(np.uint8))
            for ids, mask, length in zip(rows.ids, rows.loss_mask, rows.lengths.tolist(), strict=True)
        ]

    trainer.sft(fresh, start, demos, SftConfig(steps=3, warmup_steps=0), 1e-4, lambda step, loss: None)


def main(folder: Path) -> None:
    with Ranks(RANKS) as ranks:
        found: dict[str, Any] = {}
        lives = [(f"run/{v}", v, f"mesh/{v}", True) for v in VARIANTS if v not in LATER]
        lives += [(f"from one/{v}", v, f"one/{v}", False) for v in (*RESUMED, *LATER)]
        # a checkpoint of another mesh
        lives += [("sft", "tp and ep", "mesh/sft", False)]
        lives += [("tp from dp", "tp", "mesh/dp", False), ("ep from both", "ep", "mesh/tp and ep", False)]
        for name, variant, place, save in lives:
            trainer = TorchTrainer(view_of(config_of(variant, RANKS), "main"), folder / place, ranks)
            if name == "sft" and ranks.is_main:
                learn_demos(trainer, folder / VARIANTS[variant][0], folder / "sft of a mesh")
                trainer.close()
            elif ranks.is_main:
                found[name] = train(trainer, folder / VARIANTS[variant][0], save=save)
                if name == "run/tp and ep":
                    trainer.export(folder / "final")
                trainer.close()
            else:
                trainer.run_commands()
        for name in MESHES:
            found[f"gradient/{name}"] = on_a_mesh(name, folder, first_batches(), ranks)
        if ranks.is_main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
