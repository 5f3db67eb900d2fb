"""The trainer of tests/chaos/weights.py, which does not train: python -m tests.chaos.weight_sender FOLDER URL EPOCH.

In a file of its own since it is started often, and needs no model.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from mgrpo.transport.server import Server
from mgrpo.weights import publisher
from mgrpo.weights.publisher import WeightPublisher

CHUNK = 16 << 10  # bytes; so that a transfer has a middle
PAUSE_S = 0.4  # between two versions
STALE = 150  # versions that stay on disk


def orphaned(parent: int) -> bool:
    return os.getppid() != parent


def sender(folder: str, url: str, epoch: int) -> None:
    """A trainer without training. Versions go on from one of the last that are on disk."""
    parent, rng = os.getppid(), random.Random(epoch)
    noise = torch.Generator().manual_seed(epoch)
    saved = _saved(folder)
    path = saved[max(0, len(saved) - 1 - rng.randrange(4))]
    version, weights = int(path.stem.rpartition(".v")[2]), safetensors.torch.load_file(path)
    served = WeightPublisher(torch.float32)
    with Server(url, served.handlers()):
        while not orphaned(parent):
            label = f"main.e{epoch}.v{version}"
            fresh = Path(folder) / f"{label}.new"
            safetensors.torch.save_file(weights, fresh)
            fresh.rename(Path(folder) / f"{label}.safetensors")
            served.publish(label, version, weights.items())
            for old in _saved(folder)[:-STALE]:
                old.unlink()
            time.sleep(rng.uniform(0.5, 1.5) * PAUSE_S)
            share = 1.0 if rng.random() < 0.2 else 0.12
            for tensor in weights.values():
                moved = torch.rand(tensor.shape, generator=noise) < share
                tensor += moved * torch.randn(tensor.shape, generator=noise) * 0.01
            version += 1
    served.close()


def _saved(folder: str) -> list[Path]:
    """Versions on disk, the oldest first."""
    return sorted(Path(folder).glob("main.*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


if __name__ == "__main__":
    torch.set_num_threads(1)
    publisher.CHUNK = CHUNK
    sender(sys.argv[1], sys.argv[2], int(sys.argv[3]))
