"""The ranks of one trainer as a grid, and what lies along each side of it (policy.mesh).

    ranks           (replicate, dp, cp, tp)    rank = ((replicate * DP + dp) * CP + cp) * TP + tp
    dense weights   (replicate, dp * cp, tp)   dp and cp are one side here
    experts         (replicate, edp, ep)       edp = dp * cp * tp / ep: ranks that share the same experts

tp   Ranks that compute one micro-batch together: transformers' plan gives each its heads, its columns of the
     feed-forward blocks and its rows of the embedding. What is not cut (norms) is computed by all alike.
ep   Each rank holds whole experts; tokens go to them and come back (all-to-all). A rank of a tp group sends its share
     of the group's tokens, so none is computed twice.
cp   Ranks that divide the rows of one micro-batch (context.py), each with its own tokens for the experts. The ranks of
     a tp group have the same part of the rows; keys and values are gathered over cp, of this rank's heads alone.
dp   Every weight, or what tp and ep left of it, is sharded by FSDP2 (shard.py) along dp and cp; an expert along edp.

Gradients are sums: over dp and replicate by FSDP2, over tp by the plan. The loss of each rank is divided by the
denominator of the whole minibatch, and the ranks of a tp or cp group have the same loss, of
which each takes the gradient of its own tokens (ops/divided_head.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from mgrpo.config.policy import MeshConfig
from mgrpo.errors import ConfigError
from mgrpo.trainers.torch.context import Context


class RankMesh:
    """The grid of one trainer's ranks; made by all of them together."""

    def __init__(self, config: MeshConfig, size: int, device: str) -> None:
        """size: ranks, a multiple of replicate * cp * tp; device: "cpu" or "cuda"."""
        # A weight that is cut along two sides is gathered along one after the other: torch warns of the second one.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.config = config
        self.data: DeviceMesh
        """What dense weights are sharded along."""
        self.experts: DeviceMesh
        """What experts are sharded along."""
        self.context: Context | None = None
        """The ranks that divide rows with this one."""
        self.tp: dist.ProcessGroup | None = None
        """The ranks of this one's tp group."""
        self.same_rows: dist.ProcessGroup | None = None
        """The ranks of this one's tp and cp groups together, in their order: they have the same micro-batches, and each
        its share of the tokens that reach the head."""
        if config.cp > 1:
            sides = (size // config.same_rows, config.cp, config.tp)
            split = init_device_mesh(device, sides, mesh_dim_names=("rows", "cp", "tp"))
            self.context = Context.of(split["cp"])
            self.same_rows = self.context.group
            if config.tp > 1:
                both = init_device_mesh(device, (sides[0], config.same_rows), mesh_dim_names=("rows", "same"))
                self.same_rows = both["same"].get_group()
        copies, tp, ep = config.replicate, config.tp, config.ep
        inner = size // copies
        if tp == ep == copies == 1:
            self.data = self.experts = init_device_mesh(device, (size,), mesh_dim_names=("dp",))
            return
        # "dp" is dp and cp as one: ranks with other tokens.
        dense = init_device_mesh(device, (copies, inner // tp, tp), mesh_dim_names=("replicate", "dp", "tp"))
        expert = init_device_mesh(
            device, (copies, inner // ep, ep), mesh_dim_names=("replicate", "edp", "ep")
        )
        self.data = dense["dp"] if copies == 1 else dense["replicate", "dp"]
        self.experts = expert["edp"] if copies == 1 else expert["replicate", "edp"]
        self._tp, self._ep = dense["tp"], expert["ep"]
        if tp > 1:
            self.tp = self._tp.get_group()
            self.same_rows = self.same_rows or self.tp

    def cut(self, model: Any) -> list[Any]:
        """Apply the model's plans for tp and ep in place: its weights, the same on every rank or without memory (meta),
        become this rank's parts. Returns the modules of experts, whose weights are sharded along `experts` and not
        along `data`."""
        tp, ep = self.config.tp, self.config.ep
        if tp == ep == 1:
            return []
        from transformers.distributed import DistributedConfig
        from transformers.distributed.expert_parallel import apply_expert_parallelism
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        inner = self.data.size() // self.config.replicate
        asked = DistributedConfig(tp_size=tp, ep_size=ep, fsdp_size=inner)
        with _no_warnings():  # a plan names layers that not every model of its type has
            tp_plan, ep_plan, _ = model._resolve_parallel_plans(asked)
        if tp > 1:
            apply_tensor_parallelism(model, self._tp, _without_head(model, tp_plan))
        if ep > 1:
            apply_expert_parallelism(model, self._ep, self._tp, ep_plan, ep_implementation="all_to_all")
        modules = dict(model.named_modules())
        experts = [modules[name] for name, style in ep_plan.items() if style == "ep_dispatch_experts"]
        if ep > 1 and not experts:
            raise ConfigError(
                f"policy.mesh.ep={ep}: this {type(model).__name__} has no experts that its plan names"
            )
        for module in experts if tp > 1 else ():
            module.forward = functools.partial(_copied, module.forward)
        return experts


def _without_head(model: Any, plan: dict[str, str]) -> dict[str, str]:
    """The head has no forward here (the loss multiplies by its weight); a tied one is cut as the embedding that it is,
    one of its own along the vocabulary where the plan leaves it whole: what is cut is summed over tp, and each rank has
    the gradient of other tokens."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    tied = head.weight is model.get_input_embeddings().weight
    out = {name, f"{name}.weight"} if tied else {name}
    own = {} if tied else {f"{name}.weight": "colwise"}
    return own | {rule: style for rule, style in plan.items() if rule not in out}


def _copied(forward: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """What experts of a tp group answer is a view of what was gathered. A model that adds to it in place would lose
    FSDP's hook on it."""
    return forward(*arguments).clone()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """transformers' warnings off inside the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def whole_head(weight: DTensor) -> Tensor:
    """The head's weight (V, H), gathered. Its gradient, which every rank has for tokens of its own, is summed over
    all."""
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    return whole


def by_mesh(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """The parameters in lists of those that lie along the same sides of the grid: operations on a list of tensors take
    no others together. One list where nothing is cut in two ways."""
    lists: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        key = parameter.device_mesh if isinstance(parameter, DTensor) else None
        lists.setdefault(key, []).append(parameter)
    return list(lists.values())


def clip_gradient(parameters: Sequence[torch.nn.Parameter], limit: float) -> Tensor:
    """Scale the gradient, in place, to a norm of at most `limit`; its norm before, over all ranks."""
    lists = by_mesh(p for p in parameters if p.grad is not None)
    if len(lists) == 1:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(lists[0], limit, foreach=True)
        return _whole(norm)
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None], foreach=True)
        for part in lists
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack([_whole(norm) for norm in norms]))
    for part in lists:
        torch.nn.utils.clip_grads_with_norm_(part, limit, total, foreach=True)
    return total


def _whole(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole
