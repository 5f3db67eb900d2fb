"""What one of two ranks does in tests/test_shards.py: `python -m tests.shard_ranks FOLDER`, started once.

Rank r leaves what it found in FOLDER/found-r.pt.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from mgrpo.config import AgentView, load_config, view_of
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.config.run import SftConfig
from mgrpo.errors import ConfigError
from mgrpo.run.torchrun import as_rank
from mgrpo.trainers.base import Demos
from mgrpo.trainers.torch.learner import Learner
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.fsdp_ranks import CUTS, cut
from tests.live_bytes import peak_bytes
from tests.models import VOCAB
from tests.rows import rows_of
from tests.runs import RELAY

LAYERS = 12
HALF = PolicyConfig(dtype="bfloat16")
SFT = SftConfig(steps=3, warmup_steps=0, decay=0.0)


def view_for(ranks: int) -> AgentView:
    return view_of(load_config(RELAY, [f"agents.main.policy.ranks={ranks}"]), "main")


def demos(step: int) -> Demos:
    """An odd number of sequences; in the last step one, which leaves a rank without any."""
    numbers = np.random.default_rng(step)
    found = []
    for _ in range(1 if step == SFT.steps - 1 else 5):
        size = int(numbers.integers(4, 12))
        tokens = numbers.integers(0, VOCAB, size).astype(np.int32)
        found.append((tokens, (numbers.random(size) < 0.7).astype(np.uint8)))
    found[0][1][1:] = 1
    return found


class Counted(TorchDispatchMode):
    """Bytes that arrive in collectives of weights and gradients, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = str(func).split(".")[:2]
        if namespace in ("c10d", "_c10d_functional") and ("_base_" in name or "_tensor" in name):
            received = out if isinstance(out, torch.Tensor) else args[0]
            assert isinstance(received, torch.Tensor), name
            if "gather" in name or "reduce_scatter" in name:
                self.bytes["gathered" if "gather" in name else "reduced"] += received.nbytes
        return out


def refused(run: Callable[[], object]) -> str:
    try:
        run()
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def refusals(folder: Path, ranks: Ranks) -> dict[str, str]:
    """What is wrong on one rank alone."""
    from mgrpo.trainers.torch.shard import load_sharded

    own = folder / f"own-{ranks.rank}"
    found = {}
    for what in ("another config", "a shorter file"):
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(folder / "llama", own)
        if ranks.rank == 1 and what == "another config":
            config = json.loads((own / "config.json").read_text()) | {"rms_norm_eps": 0.5}
            (own / "config.json").write_text(json.dumps(config))
        elif ranks.rank == 1:
            file = own / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        found[what] = refused(lambda: load_sharded(own, PolicyConfig(), ranks))
    return found


def memory(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Peaks in bytes of tensors, and bytes in collectives, of a model with many layers in bfloat16."""
    from mgrpo.trainers.torch.shard import load_sharded

    loaded = []
    found: dict[str, Any] = {}
    found["load"] = peak_bytes(lambda: loaded.append(load_sharded(folder / "large", HALF, ranks)))
    policy = loaded[0]
    ids = torch.randint(0, VOCAB, (2, 8))

    def forward() -> None:
        with torch.no_grad():
            policy.hidden(ids)

    forward()  # what the first one keeps
    policy.let_go()
    found["forward"] = peak_bytes(forward)
    policy.let_go()
    rows = rows_of(1, near=True)
    rows.ids.remainder_(VOCAB - 1)
    batch = cut(rows, CUTS[1], 2).shard(ranks.rank, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    learner = Learner(policy, optimizer, GrpoLossConfig(), 1e9, ranks=ranks)
    with Counted() as counted:
        learner.step(batch)
    found["bytes"], found["micro"] = dict(counted.bytes), len(batch.micro)
    found["step"] = peak_bytes(lambda: learner.step(batch))
    for module in policy.model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False)
    found["kept"] = peak_bytes(forward)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with Ranks(2) as ranks:
        found: dict[str, Any] = {"refused": refusals(folder, ranks), "memory": memory(folder, ranks)}
        trainer = TorchTrainer(view_for(2), folder / "two", ranks)
        losses: list[float] = []
        if ranks.is_main:
            trainer.sft(
                folder / "llama", folder / "two" / "start", demos, SFT, 1e-2, lambda _, x: losses.append(x)
            )
            trainer.close()
        else:
            trainer.run_commands()
        torch.save(found | {"losses": losses}, folder / f"found-{ranks.rank}.pt")


if __name__ == "__main__":
    as_rank(lambda: main(Path(sys.argv[1])))
