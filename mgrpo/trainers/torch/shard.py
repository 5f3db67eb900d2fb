"""A policy divided over ranks with FSDP2: each rank holds its part of every weight, gradient and optimizer state.

Each decoder layer is gathered when it is needed and let go again, and so is the rest of the backbone. Gradients are
*sums* over the ranks, never means: the loss of every rank is divided by the denominator of the whole minibatch already.

All ranks must run the same number of forwards, so a micro-batch is one forward here: attention "rows", which runs as
many as there are lengths worth one, becomes "sdpa".

The head weight is needed outside of any module's forward. Where it is the embedding it is what the backbone's forward
has just gathered, and its gradient leaves with the backbone's. A head of its own is gathered by an autograd operation
whose backward sums the ranks' gradients and gives each rank its part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mgrpo.model.policy import Policy, WithoutAdapters
from mgrpo.trainers.torch.mesh import RankMesh, whole_head
from mgrpo.trainers.torch.ranks import Ranks


class ShardedPolicy(Policy):
    """A policy whose weights lie on all ranks; what it computes is the same."""

    def __init__(self, policy: Policy, ranks: Ranks) -> None:
        """Takes `policy` over: its model is sharded in place. Every rank gives one with the same weights."""
        self.__dict__.update(policy.__dict__)
        self._home = policy.device
        if self.attention == "rows":
            self.attention = "sdpa"
        backbone, head = policy.backbone, self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        self._tied = head.weight is embedding.weight
        grid = RankMesh(self.config.mesh, ranks.size, self._home.type)
        for experts in grid.cut(self.model):
            fully_shard(experts, mesh=grid.experts)
        mesh = grid.data
        names = set(getattr(self.model, "_no_split_modules", None) or ())
        for module in [m for m in backbone.modules() if type(m).__name__ in names]:
            fully_shard(module, mesh=mesh)
        fully_shard(backbone, mesh=mesh)
        if self._tied:
            head.weight = embedding.weight
        else:
            fully_shard(head, mesh=mesh)
        for module in self._units():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction

    @property
    def head_weight(self) -> Tensor:
        """(V, H), whole. With a tied head only after a forward."""
        module = self.model.get_input_embeddings() if self._tied else self.model.get_output_embeddings()
        return whole_head(module.weight)

    @property
    def device(self) -> torch.device:
        return self._home

    def base(self) -> Policy:
        """Where there are adapters, the policy without them: the same weights on the same ranks."""
        return _ShardedBase(self)

    def let_go(self) -> None:
        """Keep this rank's part alone; a forward without a backward leaves some weights gathered."""
        for module in self._units():
            module.reshard()

    def _units(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]


class _ShardedBase(WithoutAdapters, ShardedPolicy):
    """See ShardedPolicy.base."""


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_main(tensor: Tensor) -> Tensor:
    """A sharded tensor whole on rank 0, received part after part into its place; the other ranks, which all take part,
    hold no more than theirs, and get that. Any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != (Shard(0),) or tensor.device_mesh.size() < dist.get_world_size():
        return tensor.full_tensor()
    own = tensor.to_local()
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        if own.numel():
            dist.send(own.contiguous(), dst=0)
        return own
    whole = torch.empty(tensor.shape, dtype=own.dtype, device=own.device)
    parts = list(whole.chunk(size))  # as FSDP cuts: equal parts, the last ones smaller or none
    parts[0].copy_(own)
    for sender, part in enumerate(parts[1:], 1):
        dist.recv(part, src=sender)
    return whole
