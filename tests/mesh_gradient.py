"""The gradient of one minibatch in bfloat16 on a mesh of four ranks, for tests/test_mesh.py.

Weights after some steps say little about bfloat16: AdamW makes whole steps of what is rounded otherwise. The gradient
says how far the mesh is from float32, and how far one process is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.learner import Learner
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.shard import load_sharded, whole_tensor

# name -> (kind of model, mesh, other settings of the policy)
MESHES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "tp": ("llama", {"dp": 2, "tp": 2}, {}),
    "tp, last layer": ("qwen3", {"dp": 2, "tp": 2}, {"last_layers": 1}),
    "tp and ep": ("qwen3_moe", {"dp": 2, "tp": 2, "ep": 4}, {}),
    "cp": ("llama", {"dp": 2, "cp": 2}, {}),
    "cp, tp and ep": ("qwen3_moe", {"cp": 2, "tp": 2, "ep": 4}, {}),
}


def on_a_mesh(name: str, folder: Path, batches: Sequence[MiniBatch], ranks: Ranks) -> list[Tensor]:
    """f64 (parameters,) of each minibatch, whole on every rank."""
    kind, mesh, how = MESHES[name]
    config = PolicyConfig.model_validate({"dtype": "bfloat16", "mesh": mesh, "ranks": ranks.size, **how})
    rank, size = ranks.rank // config.mesh.same_rows, config.data_ranks
    policy = load_sharded(folder / kind, config, ranks)
    return _gradients(policy, [batch.shard(rank, size) for batch in batches], ranks)


def in_one_process(name: str, folder: Path, batches: Sequence[MiniBatch], dtype: str) -> list[Tensor]:
    kind, _, how = MESHES[name]
    config = PolicyConfig.model_validate(
        {"dtype": dtype, "attention": "sdpa", "share_prefixes": False, **how}
    )
    return _gradients(load_policy(folder / kind, config), batches)


def _gradients(policy: Policy, batches: Sequence[MiniBatch], ranks: Ranks | None = None) -> list[Tensor]:
    standing = torch.optim.SGD(policy.parameters(), lr=0.0)
    learner = Learner(policy, standing, GrpoLossConfig(), grad_clip=1e9, ranks=ranks)
    found = []
    for batch in batches:
        learner.step(batch)
        grads = (whole_tensor(p.grad) for p in policy.parameters() if p.grad is not None)
        found.append(torch.cat([grad.double().flatten() for grad in grads]))
    return found
