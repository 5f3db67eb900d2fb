"""What one of two trainer ranks does in tests/test_direct.py: `python -m tests.direct_ranks FOLDER BUCKET`.

Rank 0 takes commands as lines of JSON and answers each with one; the others run what rank 0's trainer broadcasts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mgrpo.config import RunConfig, load_config, view_of
from mgrpo.errors import MgrpoError
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.fsdp_ranks import batches_of
from tests.runs import RELAY

# What is published -> (kind of model, overrides of agents.main)
VARIANTS: dict[str, tuple[str, Sequence[str]]] = {
    "tied": ("shift", ()),
    "untied": ("llama", ()),
    "experts": ("moe", ()),
    "adapters": ("llama", ("policy.lora.rank=4",)),
}


def config_of(variant: str, timeout: float, dtype: str = "bfloat16") -> RunConfig:
    engine = f"{{type='vllm', sync='gloo', dtype='{dtype}', timeout={timeout}, urls=['unix:///nowhere']}}"
    sets = [f"agents.main.{part}" for part in VARIANTS[variant][1]]
    return load_config(RELAY, [*sets, "agents.main.policy.ranks=2", f"agents.main.engine={engine}"])


def answer(**what: Any) -> None:
    print("@" + json.dumps(what), flush=True)


def new_trainer(
    folder: Path, ranks: Ranks, arguments: tuple[str, float, str] | None = None
) -> TorchTrainer | None:
    """The same on all ranks, as rank 0's `arguments` of config_of() say; None where it has none."""
    chosen = ranks.gather(arguments)[0]
    if chosen is None:
        return None
    view = view_of(config_of(*chosen), "main")
    return TorchTrainer(view, folder / "run" / chosen[0], ranks)


class Main:
    """Rank 0's commands."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._said: list[str] = []
        self._trainer: TorchTrainer | None = None

    @property
    def trainer(self) -> TorchTrainer:
        assert self._trainer is not None
        return self._trainer

    def open(
        self, variant: str, urls: list[str], timeout: float, dtype: str = "bfloat16", start: str = ""
    ) -> None:
        """start: folder of another policy than the variant's."""
        self._dtype = getattr(torch, dtype)
        self._trainer = new_trainer(self._folder, self._ranks, (variant, timeout, dtype))
        self.trainer.load(Path(start) if start else self._folder / VARIANTS[variant][0])
        self.trainer.open_direct(urls, self._said.append)

    def train(self, step: int) -> None:
        self.trainer.train(batches_of(step), recompute_old=False)

    def publish(self, label: str) -> None:
        """And leave what was to be sent in a file."""
        self.trainer.publish_direct(label)
        weights = {
            name: tensor.to(self._dtype) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in self.trainer.weights()
        }
        safetensors.torch.save_file(weights, self._folder / f"{label}.safetensors")

    def probe(self) -> tuple[list[int], list[float]]:
        """Tokens, and the log-probs of all but the first."""
        found = self.trainer.probe()
        assert found is not None
        return list(found.token_ids), list(found.logprobs)

    def wait(self) -> None:
        self.trainer.heartbeat()

    def close(self) -> None:
        self.trainer.close()

    def said(self) -> list[str]:
        lines, self._said[:] = list(self._said), []
        return lines


def main(folder: Path, bucket: int) -> None:
    torch.set_num_threads(1)
    TorchTrainer.bucket_bytes = bucket
    with Ranks(2) as ranks:
        if not ranks.is_main:
            while (trainer := new_trainer(folder, ranks)) is not None:
                trainer.run_commands()
            return
        commands = Main(folder, ranks)
        for line in sys.stdin:
            do, arguments = json.loads(line)
            try:
                answer(found=getattr(commands, do)(**arguments), said=commands.said())
            except MgrpoError as error:
                answer(error=f"{type(error).__name__}: {error}", said=commands.said())
        new_trainer(folder, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
