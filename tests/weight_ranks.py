"""What one of two ranks does in tests/test_weight_stream.py: `python -m tests.weight_ranks FOLDER`, started once.

Rank r leaves what it found in FOLDER/found-r.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mgrpo.config import AgentView, load_config, view_of
from mgrpo.model.policy import Policy
from mgrpo.model.stream import WeightStream
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.base import Checkpoint
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.families import family
from tests.live_bytes import peak_bytes
from tests.models import VOCAB, tiny_policy, tiny_tokenizer
from tests.runs import RELAY

LAYERS = 6
LORA = ("policy.lora.rank=4", "policy.lora.alpha=12.0")
EXPERTS = ("policy.lora.rank=4", 'policy.lora.targets=["q_proj", "o_proj"]')
FUSED = ("policy.lora.rank=4", 'policy.lora.targets=["q_proj", "experts.gate_up_proj", "experts.down_proj"]')

# What is published -> (the policy it starts from, overrides of agents.main)
VARIANTS: dict[str, tuple[str, Sequence[str]]] = {
    "own decoder": ("shift", ()),
    "untied": ("llama", ()),
    "tied": ("qwen2", ()),
    "experts": ("qwen3moe", ()),
    "adapters": ("llama", LORA),
    "adapters beside biases": ("qwen2", (*LORA, 'policy.dtype="bfloat16"')),
    "adapters beside experts": ("qwen3moe", (*EXPERTS, 'policy.dtype="bfloat16"')),
    "adapters of experts": ("qwen3moe", FUSED),
    "adapter alone": ("llama", (*LORA, 'engine.type="vllm"', 'engine.sync="lora"')),
    "last layer": ("llama", ("policy.last_layers=1", 'policy.dtype="bfloat16"')),
}


def start_policy(kind: str) -> Policy:
    # transformers loads a tokenizer of these with one token more.
    if kind == "qwen2":
        return Policy(family("Qwen2", tie_word_embeddings=True), tiny_tokenizer(VOCAB - 1), kind)
    if kind == "qwen3moe":
        return Policy(family("Qwen3Moe"), tiny_tokenizer(VOCAB - 1), kind)
    return tiny_policy(kind)  # type: ignore[arg-type]


def large_model(kind: str) -> Any:
    """Several layers, each larger than everything beside them."""
    shape = {"hidden_size": 128, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    if kind == "Qwen3Moe":
        return family(kind, **shape, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    return family(kind, **shape, intermediate_size=256)


def layer_bytes(model: Any) -> int:
    """Of one decoder layer."""
    return sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())


def view_for(variant: str, ranks: int) -> AgentView:
    sets = [f"agents.main.{part}" for part in VARIANTS[variant][1]]
    return view_of(load_config(RELAY, [*sets, f"agents.main.policy.ranks={ranks}"]), "main")


class Moved(TorchTrainer):
    """What trains has moved away from its start, so that adapters are seen."""

    def _load(self, start: Path, checkpoint: Checkpoint | None) -> None:
        super()._load(start, checkpoint)
        with torch.no_grad():
            for parameter in self._own.policy.parameters():
                parameter.mul_(1.25).add_(0.03)


def published(trainer: TorchTrainer) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in trainer.weights()]


def publish(trainer: TorchTrainer, start: Path, final: Path) -> dict[str, Any]:
    """What a trainer gives from `start`; a reading that is given up half way lies in between."""
    trainer.load(start)
    before = trainer.probe()
    given_up = trainer.weights()
    part = [(name, tensor.clone()) for name, tensor in islice(given_up, 3)]
    assert before is not None
    found = {"weights": published(trainer), "part": part, "probe": (before.token_ids, before.logprobs)}
    try:
        found["refused"] = next(given_up)[0]
    except RuntimeError as error:
        found["refused"] = str(error)
    trainer.export(final)
    after = trainer.probe()
    assert after == before
    trainer.close()
    return found


def peaks(folder: Path, ranks: Ranks) -> dict[str, tuple[int, int]]:
    """(most bytes alive, bytes of a layer) while a sharded model is read; rank 0 rounds each tensor as a publisher
    does, the other takes part."""
    from mgrpo.trainers.torch.shard import gather_to_main
    from tests.sharded import sharded

    found = {}
    for kind in ("Qwen2", "Qwen3Moe"):
        model = large_model(kind)
        layer = layer_bytes(model)
        policy = sharded(Policy(model, tiny_tokenizer(), kind), folder / "large" / kind, ranks)
        reading = WeightStream(policy.model).read(gather_to_main)

        def read(reading: Any = reading) -> None:
            if ranks.is_main:
                for _, tensor in reading:
                    tensor.to(torch.bfloat16)
            reading.finish()

        found[kind] = (peak_bytes(read), layer)
    return found


def main(folder: Path) -> None:
    with Ranks(2) as ranks:
        found: dict[str, Any] = {}
        for variant, (kind, _) in VARIANTS.items():
            trainer = Moved(view_for(variant, 2), folder / "two" / variant, ranks)
            if ranks.is_main:
                found[variant] = publish(trainer, folder / kind, folder / "two" / variant / "final")
            else:
                trainer.run_commands()
        found["peaks"] = peaks(folder, ranks)
        torch.save(found, folder / f"found-{ranks.rank}.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
