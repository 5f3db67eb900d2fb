"""What a policy computes in, beside the float32 master weights that train.

With dtype "bfloat16" the backbone computes in bfloat16 from end to end, as a sampler that is served in bfloat16 does:
parameters take part as bfloat16 copies of their masters, and what enters a unit (a decoder layer, or the rest of the
backbone) is rounded. What `model.parameters()` lists, what the optimizer, checkpoints and published weights see, are
the masters. Where a model's own code computes in float32 (norms, a router's softmax, rotations) it does so here too.

    one rank        a copy is made when its master has changed, once a step, and kept. Units put the copies in the place
                    of the masters while they run, also when gradient checkpointing runs them again. Each use of a copy
                    is linked to its master, so gradients arrive in float32 and add up in float32
    several ranks   FSDP2 casts what it gathers (`fsdp_policy`); the units find bfloat16 parameters and copy nothing

Deviations: 1. A plain embedding is looked up in its master and rounded after: the same number without a copy of the
table, and a float32 sum of gradients for tokens that occur often. 2. Parameters that the architecture keeps in float32
when it is loaded in bfloat16 (`_keep_in_fp32_modules_strict`) stay float32 (`float32_modules`). 3. Frozen matrices,
embeddings and experts are kept in bfloat16 alone: without updates a master says no more than its copy.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mgrpo.config.policy import PolicyConfig
from mgrpo.model import moe
from mgrpo.model.head_guard import backbone_of
from mgrpo.model.trained import decoder_layers

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


CUTS = ("tp", "ep")
"""Sides of a mesh of ranks along which a model computes with parts of its weights (policy.mesh)."""


def compute_dtype(config: PolicyConfig) -> torch.dtype:
    """What the backbone computes in."""
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def head_dtype(config: PolicyConfig) -> torch.dtype:
    """What the operands of the head's products are rounded to; logits are float32 either way."""
    if config.head_dtype == "auto":
        return compute_dtype(config)
    return torch.bfloat16 if config.head_dtype == "bfloat16" else torch.float32


def fsdp_policy(config: PolicyConfig) -> MixedPrecisionPolicy:
    """The mixed precision of every FSDP2 unit but `float32_modules`: weights are gathered in what is computed in,
    gradients summed over the ranks in float32. Inputs are rounded by the units here, not by FSDP2, so that
    Precision.full() reaches them."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if config.dtype == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=compute_dtype(config), reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def float32_modules(model: Any) -> list[nn.Module]:
    """Modules of a transformers model with parameters that its architecture keeps in float32 whatever it is loaded in:
    units of their own for FSDP2, without mixed precision, since one unit has one dtype."""
    kept = {id(parameter) for parameter in _kept_in_float32(model)}
    return [
        module for module in model.modules() if any(id(p) in kept for p in module.parameters(recurse=False))
    ]


def kept_in_half(model: Any, config: PolicyConfig) -> list[nn.Parameter]:
    """Parameters that a policy of this configuration keeps in bfloat16 alone where they are frozen: those with two
    dimensions or more (matrices, embeddings, fused experts), but for the head where it is multiplied in float32 and
    what the architecture keeps in float32. Vectors are too small to matter. Everything where nothing is frozen yet."""
    if config.dtype == "float32":
        return []
    exact = {id(parameter) for parameter in _kept_in_float32(model)}
    if head_dtype(config) == torch.float32:
        exact.add(id(model.get_output_embeddings().weight))
    return [p for p in model.parameters() if p.dim() > 1 and p.is_floating_point() and id(p) not in exact]


def _kept_in_float32(model: Any) -> Iterator[nn.Parameter]:
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if not names:
        return
    pattern = re.compile("|".join(rf"(?:^|\.){name}(?:\.|$)" for name in names))
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            yield parameter


class Precision:
    """Has the units of one model compute in what the configuration says."""

    def __init__(self, model: Any, config: PolicyConfig, name: str) -> None:
        """Takes `model` over, whose parameters have been chosen: its units' forwards are wrapped in place. Nothing
        happens in float32. name: how errors call the policy. Raises ConfigError where its layers are not found."""
        self.dtype = compute_dtype(config)
        self._model, self._config = model, config
        self._exact = False
        self.keeps_copies = True
        """Whether copies are kept from one forward to the next; not of what FSDP2 gathers anew."""
        self._masters: dict[tuple[int, str], Tensor] = {}  # of a sharded model, in full()
        # By the id of a master: itself, its version, its copy.
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}
        if self.dtype == torch.float32:
            return
        self.freeze_in_half()
        self._float32 = {id(module) for module in float32_modules(model)}
        backbone = backbone_of(model, name)
        inside: set[int] = set()
        # Experts that are spread over ranks are gathered by themselves, after their layer.
        experts = moe.experts_of(model) if config.mesh.ep > 1 else {}
        for unit in (*experts.values(), *decoder_layers(model, name), backbone):
            modules = [module for module in unit.modules() if id(module) not in inside]
            inside |= {id(module) for module in modules}
            forward = functools.partial(self._run, _places(modules), unit.forward)
            unit.forward = functools.wraps(unit.forward)(forward)
            for module in modules:
                if type(module) is nn.Embedding:
                    module.register_forward_hook(self._round)

    def freeze_in_half(self) -> None:
        """Keep what is frozen now in bfloat16 alone."""
        self._copies.clear()
        for parameter in kept_in_half(self._model, self._config):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded at the moment."""
        return self._exact

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Inside the block the model computes in float32, from the masters, widening what is kept in bfloat16 alone,
        one unit at a time. A sharded model must be sharded when the block begins; each unit's masters are then
        gathered, which takes every rank."""
        before, self._exact = self._exact, True
        self._masters = {
            (id(module), name): parameter.detach()
            for module in self._model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if _is_sharded(parameter)
        }
        try:
            yield
        finally:
            self._exact, self._masters = before, {}

    def whole(self, module: nn.Module, name: str = "weight") -> Tensor:
        """In full(): a parameter whole, in float32. Takes every rank where it is sharded."""
        if (master := self._masters.get((id(module), name))) is not None:
            return master.full_tensor().float()  # type: ignore[attr-defined, no-any-return]
        parameter = module._parameters[name]
        assert parameter is not None
        return parameter.float()

    def _run(
        self, places: list[tuple[nn.Module, str]], forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        dtype = torch.float32 if self._exact else self.dtype
        args, kwargs = _rounded(args, dtype), _rounded(kwargs, dtype)
        before: list[tuple[nn.Module, str, Any]] = []
        try:
            for module, name in places:
                parameter = module._parameters[name]
                if parameter is not None and (other := self._stand_in(module, name, parameter)) is not None:
                    before.append((module, name, parameter))
                    module._parameters[name] = other  # type: ignore[assignment]
            return forward(*args, **kwargs)
        finally:
            for module, name, parameter in before:
                module._parameters[name] = parameter

    def _stand_in(self, module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
        """What takes the parameter's place while its unit runs; None: itself."""
        if not parameter.is_floating_point() or _is_sharded(parameter):  # sharded: of a unit within this one
            return None
        if self._exact:
            if parameter.dtype == torch.float32:
                return None
            master = self._masters.get((id(module), name))
            return parameter.float() if master is None else _gathered(master, parameter)
        if parameter.dtype == self.dtype or type(module) is nn.Embedding or id(module) in self._float32:
            return None
        copy = self._copy_of(parameter)
        if torch.is_grad_enabled() and parameter.requires_grad:
            linked: Tensor = _Linked.apply(parameter, copy)  # type: ignore[no-untyped-call]
            return linked
        return copy

    def _copy_of(self, master: Tensor) -> Tensor:
        held = self._copies.get(id(master))
        if held is not None and held[0] is master and held[1] == master._version:
            return held[2]
        with torch.inference_mode(False), torch.no_grad():
            copy = master.detach().to(self.dtype)
        if self.keeps_copies:
            self._copies[id(master)] = master, master._version, copy
        return copy

    def _round(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output.float() if self._exact else output.to(self.dtype)


def _gathered(master: Any, place: Tensor) -> Tensor:
    """A sharded master in float32 as FSDP2 gathers it to `place`: whole, but for what the model itself is cut along."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = master.device_mesh
    names = mesh.mesh_dim_names or ()
    cut = [p if name in CUTS else Replicate() for name, p in zip(names, master.placements, strict=True)]
    found: Tensor = master.redistribute(placements=cut).to_local().float()
    for name, placement in zip(names, cut, strict=True):
        if name in CUTS and isinstance(place, DTensor):  # else its module computes with local tensors
            return DTensor.from_local(found, mesh[name], [placement], run_check=False)
    whole: Tensor = found if found.shape == place.shape else master.full_tensor().float()
    return whole


class _Linked(torch.autograd.Function):
    """A master's copy, whose gradient goes to the master in the master's dtype."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None


def _is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 has yet to gather it; what is gathered may still be a part that the model is cut into."""
    if type(tensor) in (Tensor, nn.Parameter):  # most are; the import takes a while
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) and any(
        name not in CUTS for name in tensor.device_mesh.mesh_dim_names or ("",)
    )


def _places(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module in modules for name in module._parameters]


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of a forward with their floating tensors in `dtype`. Looks into plain containers alone: a cache of keys
    and values is passed on as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_rounded(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _rounded(item, dtype) for key, item in value.items()}
    return value
