"""Which of a policy's parameters train, and what its backward pass keeps."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import lora, moe
from mgrpo.model.head_guard import language_model_of


def decoder_layers(model: Any, name: str) -> nn.ModuleList:
    """The decoder layers of a transformers model, first to last. Raises ConfigError where they are not a list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in language_model_of(model, name).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"{name}: {type(model).__name__} has no list of its {count} decoder layers")


def choose_trained(model: Any, config: PolicyConfig, name: str) -> None:
    """Put adapters into `model` and freeze what does not train. Raises ConfigError naming setting and bound."""
    _freeze_what_rows_do_not_reach(model, name)
    if config.lora.rank:
        lora.add_adapters(model, config.lora, name)
    elif config.last_layers:
        _freeze_all_but(model, config.last_layers, name)
    if not config.train_router:
        for router in moe.routers_of(model):
            router.module.requires_grad_(False)


COMPILER = "inductor"
"""torch.compile's backend."""


def compile_layers(model: Any, config: PolicyConfig, name: str) -> None:
    """With `compile`, have torch.compile make kernels of the decoder layers. All layers of one kind share what is
    compiled, for any number of tokens. Comes before whatever else wraps a layer's forward."""
    if config.compile:
        if moe.routers_of(model):
            raise ConfigError(
                f"{name}: policy.compile=true with {type(model).__name__}, a mixture of experts, whose products depend "
                "on where its routers send tokens; set compile=false"
            )
        for layer in decoder_layers(model, name):
            layer.forward = torch.compile(layer.forward, backend=COMPILER, dynamic=True)


def uncompiled() -> AbstractContextManager[Any]:
    """Inside the block, what compile_layers() compiled runs as it was written: for passes that come rarely."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def recompute_layers(model: Any, config: PolicyConfig, name: str) -> None:
    """With `gradient_checkpointing`, keep trained layers' inputs alone. Comes after whatever else wraps a layer's
    forward: what is wrapped by then runs again too."""
    if config.gradient_checkpointing:
        for layer in decoder_layers(model, name):
            if any(p.requires_grad for p in layer.parameters()):
                _recompute(layer)


def _freeze_what_rows_do_not_reach(model: Any, name: str) -> None:
    """Towers for images and sound keep the weights that they came with, and have no optimizer state."""
    language = language_model_of(model, name)
    reached = {id(p) for p in (*language.parameters(), model.get_output_embeddings().weight)}
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _freeze_all_but(model: Any, last: int, name: str) -> None:
    """Only the last `last` decoder layers train, and what the backbone computes behind them (the final norm)."""
    layers = decoder_layers(model, name)
    if last > len(layers):
        raise ConfigError(f"{name}: policy.last_layers={last} exceeds its {len(layers)} decoder layers")
    model.requires_grad_(False)
    for layer in layers[-last:]:
        layer.requires_grad_(True)
    children = list(language_model_of(model, name).children())
    if layers in children:
        for behind in children[children.index(layers) + 1 :]:
            behind.requires_grad_(True)


def _recompute(layer: nn.Module) -> None:
    """Keep the layer's input only and run it again in the backward pass. Its forward is wrapped, not the module, so
    names stay and hooks run once; policies have no dropout, so there is no random state to bring back."""
    layer.forward = functools.partial(
        checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
    )
