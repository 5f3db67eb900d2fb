"""All weights of a model anew, through vLLM's layerwise reload, without a whole model in between.

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
        except BaseException:
            _abandon(model, layerwise)
            raise
        finally:
            cpu.pack_tied(model)


def _abandon(model: Any, layerwise: Any) -> None:
    """Give the layers that are not complete their former tensors back."""
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()
