"""vLLM's CPU layers keep packed copies of their weights; what that takes from an update in place, and how it is undone.

On a CPU vLLM packs the weights of each linear layer for its matrix kernel after loading and drops the plain ones; an
embedding keeps both. The packed copy is made by `process_weights_after_loading` and by nothing else, hence two faults
of vLLM 0.32: a reload leaves the head of a tied model as it was (the head loads nothing itself), and leaves experts
unpacked (the kernel that packs them exists already). Here

1. plain weights are kept, beside the packed ones, where patches are to come (MGRPO_KEEP_PLAIN, unset or 1): the weights
   then take twice their memory,
2. after an update every layer whose weights changed is packed again, tied ones included.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch

PLAIN = "_mgrpo_plain"  # of a layer of experts: its weights before they were packed


def keep_plain_weights() -> None:
    """Make vLLM's layers keep what they pack. Idempotent; nothing on other devices."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("MGRPO_KEEP_PLAIN") == "0":
        return
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    dispatch, experts = utils.dispatch_cpu_unquantized_gemm, cpu_moe.CPUUnquantizedExperts
    if hasattr(dispatch, "mgrpo"):
        return

    def keep(layer: Any, remove_weight: bool) -> None:
        dispatch(layer, False)

    pack = experts.process_weights_after_loading

    def pack_copies(self: Any, layer: Any) -> None:
        setattr(layer, PLAIN, {name: getattr(layer, name) for name in ("w13_weight", "w2_weight")})
        pack(self, layer)

    keep.mgrpo = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = keep
    experts.process_weights_after_loading = pack_copies


@contextlib.contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """The plain weights of experts are back in their layers, for an update in place, and are packed again after it."""
    experts = [layer for layer in model.modules() if hasattr(layer, PLAIN)]
    for layer in experts:
        for name, weight in getattr(layer, PLAIN).items():
            delattr(layer, name)
            layer.register_parameter(name, weight)
    try:
        yield
    finally:
        for layer in experts:
            method: Any = layer.quant_method
            method.moe_kernel = None  # which makes it pack, as after the first load
            method.process_weights_after_loading(layer)


def pack(model: torch.nn.Module, changed: AbstractSet[int] | None = None) -> None:
    """Pack the layers again whose weights lie in the storages `changed` (data pointers; None: all layers)."""
    for layer in model.modules():
        if not hasattr(layer, "cpu_linear"):
            continue
        if changed is None or any(storage(p) in changed for p in layer.parameters(recurse=False)):
            method: Any = layer.quant_method
            method.process_weights_after_loading(layer)


def pack_tied(model: torch.nn.Module) -> None:
    """After a reload: pack what shares its weights with a layer that was loaded, the head of a tied model."""
    seen: dict[int, int] = {}
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel():  # type: ignore[operator]
            place = storage(layer.weight)  # type: ignore[arg-type]
            seen[place] = seen.get(place, 0) + 1
    pack(model, {place for place, layers in seen.items() if layers > 1})


def forget_kernels(model: torch.nn.Module) -> None:
    """Before a reload on a CPU: experts pack their weights only while they have no kernel."""
    for layer in model.modules() if is_cpu(model) else ():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_cpu(model: torch.nn.Module) -> bool:
    """Where the weights lie."""
    return next(model.parameters()).device.type == "cpu"
