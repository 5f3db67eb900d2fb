"""A policy divided over ranks with FSDP2: each rank holds its part of every weight, gradient and optimizer state.

    config.json  ->  model without memory  ->  frozen, adapted, divided  ->  each rank's parts allocated  ->  read

No rank has the whole model at any time: a rank reads from the files what it holds (parts.py).

Each decoder layer is gathered when it is needed and let go again, and so is the rest of the backbone. Gradients are
*sums* over the ranks, never means: the loss of every rank is divided by the denominator of the whole minibatch already.

All ranks must run the same number of forwards, so a micro-batch is one forward here: attention "rows", which runs as
many as there are lengths worth one, becomes "sdpa".

The head weight is needed outside of any module's forward. Where it is the embedding it is what the backbone's forward
has just gathered, and its gradient leaves with the backbone's (where layers compute in bfloat16 the table is a unit of
its own, in float32: see precision.py). A head of its own is gathered by an autograd operation
whose backward sums the ranks' gradients and gives each rank its part.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import attention, head_guard, lora
from mgrpo.model.loading import BlankPolicy, blank_policy, reference_config
from mgrpo.model.mesh import check_mesh
from mgrpo.model.parts import part_of
from mgrpo.model.policy import Policy, WithoutAdapters
from mgrpo.model.precision import float32_modules, fsdp_policy
from mgrpo.model.shared_rows import HeldPrefix
from mgrpo.model.trained import choose_trained, recompute_layers
from mgrpo.ops.divided_head import TokenShare, own_rows
from mgrpo.trainers.torch.heap import return_freed_memory
from mgrpo.trainers.torch.mesh import RankMesh, whole_head
from mgrpo.trainers.torch.ranks import Ranks

T = TypeVar("T")


def load_sharded(path: str | Path, config: PolicyConfig, ranks: Ranks, frozen: bool = False) -> ShardedPolicy:
    """The policy in the folder `path`, which every rank reads its part of: a collective. frozen: nothing of it trains.

    Raises ConfigError as load_policy does, on every rank where it is raised on one, and where ranks find other files or
    the model cannot be cut as policy.mesh asks.
    """
    together(ranks, lambda: check_mesh(Path(path), config))
    blank = together(ranks, lambda: blank_policy(path, config))
    for rank, found in enumerate(ranks.gather(blank.digest)):
        if found != blank.digest:
            raise ConfigError(
                f"policy folder {path}: rank {rank} finds other files there (digest {found}) than rank {ranks.rank} "
                f"({blank.digest}); give all ranks the same config.json and safetensors files"
            )
    return ShardedPolicy(blank, ranks, frozen)


def load_sharded_reference(policy: Policy, path: str | Path, ranks: Ranks) -> Policy:
    """As load_reference, divided as `policy` is: a collective."""
    if policy.config.lora.rank:
        return policy.base()
    return load_sharded(path, reference_config(policy.config), ranks, frozen=True)


def together(ranks: Ranks, run: Callable[[], T]) -> T:
    """What `run` returns on this rank. ConfigError of one rank is raised on all, so that none waits for another."""
    result, error = None, ""
    try:
        result = run()
    except ConfigError as raised:
        error = str(raised)
    for found in ranks.gather(error):
        if found:
            raise ConfigError(found)
    return cast("T", result)


class ShardedPolicy(Policy):
    """A policy whose weights lie on all ranks; what it computes is the same."""

    def __init__(self, blank: BlankPolicy, ranks: Ranks, frozen: bool = False) -> None:
        """blank: the same on every rank; its model is divided in place and filled. Raises ConfigError as Policy."""
        self._blank, self._ranks, self._frozen = blank, ranks, frozen
        self._home = (
            torch.device("cuda", torch.cuda.current_device())
            if blank.config.device == "cuda"
            else torch.device("cpu")
        )
        return_freed_memory()
        super().__init__(blank.model, blank.tokenizer, blank.name, blank.config)
        del self._blank

    def _set_up(self, head: Any) -> None:
        model, name = self.model, self.name
        choose_trained(model, self.config, name)
        if self._frozen:
            model.requires_grad_(False)
        self._round()
        self.precision.keeps_copies = False
        recompute_layers(model, self.config, name)
        self._tied = head.weight is model.get_input_embeddings().weight
        grid = RankMesh(self.config.mesh, self._ranks.size, self._home.type)
        self._context, self._tp, self._same_rows = grid.context, grid.tp, grid.same_rows
        divide(model, self._trunk, grid, self.config)
        allocate(model, self._home)
        together(self._ranks, lambda: self._blank.parts.read_into(model))
        begin_adapters(model)
        with self.full_precision(), _with_whole_head(head) as weight:
            head_guard.check_head(model, self._trunk, head, self._states, name, weight)
            attention.check_padded(model, self._states, self.device, name)
            if (context := self._context) is not None:
                context.use(model)
                together(self._ranks, lambda: context.check(self._states, self.device, name))
        self.let_go()
        kind = "sdpa" if context else attention.choose(model, self._states, self.config, self.device, name)
        self.attention = "sdpa" if kind == "rows" else kind
        together(self._ranks, self._prove_replay)
        self._choose_sharing()
        self._offload = self.config.activation_offload
        self.let_go()

    def hidden_before(
        self, input_ids: Tensor, lengths: Tensor, scored: Tensor, held: HeldPrefix | None = None
    ) -> Tensor:
        if (context := self._context) is None:
            hidden = super().hidden_before(input_ids, lengths, scored, held)
        else:
            ids = input_ids[:, :-1]
            own = context.own_columns(ids.shape[1])
            self.routing.expect_columns((lengths - 1).clamp(min=1), own, self.device)
            hidden = context.hidden(self._states, ids, scored, self.device)
        return hidden if self._tp is None else own_rows(hidden, self._tp)

    def share_of(self, scored: Tensor) -> TokenShare | None:
        if self._same_rows is None:
            return None
        found = self._context.places(scored) if self._context else [torch.arange(int(scored.sum()))]
        places = [part for place in found for part in place.tensor_split(self.config.mesh.tp)]
        return TokenShare.of(self._same_rows, places, self.device)

    @property
    def head_weight(self) -> Tensor:
        """(V, H), whole. With a tied head only after a forward. Its gradient is summed over all ranks."""
        model = self.model
        module: torch.nn.Module = (
            model.get_input_embeddings() if self._tied else model.get_output_embeddings()
        )
        if self.precision.exact:
            return self.precision.whole(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if isinstance(weight, DTensor):
            return whole_head(weight)
        return weight.float() if self._dtype == torch.float32 else weight

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
        for module in _units(self.model):
            module.reshard()


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


def divide(model: Any, backbone: Any, grid: RankMesh, config: PolicyConfig) -> None:
    """Have each rank of `grid` hold its part of the parameters, which may lie on the meta device: a decoder layer is a
    unit of its own, and so are the rest of the backbone and a head that is not tied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied, how, mesh = head.weight is embedding.weight, fsdp_policy(config), grid.data
    for experts in grid.cut(model):
        fully_shard(experts, mesh=grid.experts, mp_policy=how)
    if config.dtype != "float32":
        for module in float32_modules(model):
            fully_shard(module, mesh=mesh)
        # Looked up in float32, as on one rank; a tied head needs it until the end.
        if type(embedding) is nn.Embedding:
            fully_shard(embedding, mesh=mesh, reshard_after_forward=not tied)
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed([m for m in backbone.modules() if type(m).__name__ in names]):  # inner ones first
        fully_shard(module, mesh=mesh, mp_policy=how)
    fully_shard(backbone, mesh=mesh, mp_policy=how)
    if tied:
        head.weight = embedding.weight
    else:
        fully_shard(head, mesh=mesh)
    for module in _units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


@contextlib.contextmanager
def _with_whole_head(head: Any) -> Iterator[Tensor]:
    """For a forward of the model itself in float32: its head multiplies by the whole weight, which is given."""
    weight = whole_tensor(head.weight).detach().float()
    head.forward = functools.partial(F.linear, weight=weight)
    try:
        yield weight
    finally:
        del head.forward


def _units(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def allocate(model: Any, device: torch.device) -> None:
    """Memory for what of a model without any lies on this rank. Buffers that have some keep theirs, and what was one
    tensor under several names stays one."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    first: dict[int, str] = {}
    shared = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device)
    for name, other in shared.items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(other))


@torch.no_grad()
def begin_adapters(model: Any) -> None:
    """This rank's part of what adapters begin with."""
    for name, parameter in model.named_parameters():
        start = lora.start_of(name, parameter.shape)
        if start is not None:
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own.copy_(part_of(parameter, start))
