"""Weights into a vLLM model that runs, and with them everything that vLLM has computed from them.

All of them anew, through vLLM's layerwise reload, without a whole model in between:

    with reloading(model, vllm_config) as load:
        load([(checkpoint name, whole tensor), ...])  # any number of times

vLLM puts the layers on the meta device, collects what is loaded into each, and fills and processes a layer as soon as
it is complete: tensors of one layer should come near each other. A load that fails leaves old and new layers mixed, but
a model that another load repairs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mgrpo.engines.vllm.plugin import cpu
from mgrpo.engines.vllm.plugin.in_place import InPlace

Tensors = Iterable[tuple[str, torch.Tensor]]


@contextlib.contextmanager
def reloading(model: Any, vllm_config: Any) -> Iterator[Callable[[Tensors], None]]:
    """See the module's docstring. Raises what the model's loader raises."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    with torch.no_grad(), set_current_vllm_config(vllm_config):
        cpu.forget_kernels(model)
        layerwise.initialize_layerwise_reload(model)
        try:
            yield model.load_weights
            layerwise.finalize_layerwise_reload(model, vllm_config.model_config)
            _synchronize()
        except BaseException:
            _abandon(model, layerwise)
            raise
        finally:
            cpu.pack_tied(model)


def apply_in_place(patch: InPlace, model: Any, vllm_config: Any, changes: Iterable[Any]) -> None:
    """Also what has been computed from the weights: packed copies, and what attention layers keep of theirs."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config):
        try:
            with cpu.unpacked(model):
                patch.apply(changes)
        finally:
            cpu.pack(model, patch.storages)
        for layer in _attention_layers(model):
            layer.process_weights_after_loading(vllm_config.model_config.dtype)
    _synchronize()


def _attention_layers(model: Any) -> list[Any]:
    """Those that compute something of their weights when all are loaded, as vLLM's reload finds them."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return [layer for layer in model.modules() if is_deferred_attention_layer(layer)]


def _abandon(model: Any, layerwise: Any) -> None:
    """Give the layers that are not complete their former tensors back."""
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
