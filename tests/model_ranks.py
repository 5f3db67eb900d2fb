"""What one of two ranks does for the table of models: `python -m tests.model_ranks FOLDER TITLE...`, started once for
all rows. Rank 0 leaves what it found in FOLDER/found.pt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from mgrpo.errors import ConfigError
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.model_rows import HALF, STEPS, steps, trainer_of, weights


def train(trainer: TorchTrainer, folder: Path) -> dict[str, Any]:
    """Rank 0's part."""
    try:
        trainer.load(folder / "start")
    except ConfigError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"before": weights(trainer), "metrics": steps(trainer)}
    found["after"] = weights(trainer)
    trainer.save(STEPS)
    trainer.saved(wait=True)
    trainer.export(folder / "two" / "final")
    found["units"] = all(isinstance(layer, FSDPModule) for layer in trainer._own.policy.layers)
    trainer.close()
    return found


def train_half(trainer: TorchTrainer, folder: Path) -> dict[str, Any]:
    """Rank 0's part of a step in bfloat16."""
    trainer.load(folder / "start")
    found = {"half metrics": steps(trainer, 1), "half": weights(trainer)}
    trainer.close()
    return found


def follow(trainer: TorchTrainer) -> bool:
    """The other rank's part: what rank 0 refuses it refuses too, and False is returned."""
    try:
        trainer.run_commands()
    except ConfigError:
        return False
    return True


def main(folder: Path, titles: Sequence[str]) -> None:
    found = {}
    with Ranks(2) as ranks:
        for title in titles:
            trainer = trainer_of(folder / title / "two", ranks, "gradient_checkpointing=true")
            half = trainer_of(folder / title / "two half", ranks, HALF)
            if ranks.is_main:
                found[title] = train(trainer, folder / title)
                if "refused" not in found[title]:
                    found[title] |= train_half(half, folder / title)
            elif follow(trainer):
                half.run_commands()
        if ranks.is_main:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1]), sys.argv[2:]))
