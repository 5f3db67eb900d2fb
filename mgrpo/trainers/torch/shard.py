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

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

from mgrpo.model.policy import Policy, WithoutAdapters
from mgrpo.model.precision import float32_modules, fsdp_policy
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
        mesh = init_device_mesh(self._home.type, (ranks.size,))
        names = set(getattr(self.model, "_no_split_modules", None) or ())
        how = fsdp_policy(self.config)
        for module in float32_modules(self.model) if self.config.dtype != "float32" else ():
            fully_shard(module, mesh=mesh)
        for module in [m for m in backbone.modules() if type(m).__name__ in names]:
            fully_shard(module, mesh=mesh, mp_policy=how)
        fully_shard(backbone, mesh=mesh, mp_policy=how)
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
        if self.precision.exact:
            whole: Tensor = self.precision.whole(module)
            return whole
        weight: Tensor = module.weight
        if isinstance(weight, DTensor):
            whole: Tensor = weight.full_tensor(grad_placements=(Partial(),))
            return whole
        return weight

    @property
    def device(self) -> torch.device:
        return self._home

    def base(self) -> Policy:
        """Where there are adapters, the policy without them: the same weights on the same ranks."""
        return _ShardedBase(self)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        self.let_go()  # a unit's masters are gathered where they are sharded
        with super().full_precision():
            yield

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
    if tensor.placements != (Shard(0),):
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
