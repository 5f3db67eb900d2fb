"""Low-rank adapters: each chosen linear layer W computes W x + (alpha / rank) B A x, and only A and B train.

    published weights   W + (alpha / rank) B A under the plain model's names: an engine knows nothing of adapters
    adapter             A and B alone, in peft's files
    reference policy    the same model with the adapters off

The layers are peft's, put into the model in place, so that everything else about the model stays as it was. B starts
at 0, A at numbers that follow from its layer's name alone, so that every process that loads the policy starts equal.
peft is imported when a policy has adapters.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config.policy import LoraConfig
from mgrpo.errors import ConfigError

_ADAPTER = "default"
_BASE = ".base_layer."
_A, _B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def add_adapters(model: Any, config: LoraConfig, name: str) -> None:
    """Put adapters into `model` and freeze everything else. name: how errors call the policy. Raises ConfigError."""
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            f'{name}: policy.lora.rank={config.rank} needs the package peft (pip install "mgrpo[lora]")'
        ) from None
    _check_targets(model, config, name)
    inject_adapter_in_model(
        PeftConfig(
            r=config.rank,
            lora_alpha=int(config.alpha)
            if config.alpha.is_integer()
            else config.alpha,  # others expect an int
            target_modules=list(config.targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        model,
    )
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
        start = start_of(parameter_name, parameter.shape)
        if start is not None:
            with torch.no_grad():
                parameter.copy_(start)


def _check_targets(model: Any, config: LoraConfig, name: str) -> None:
    """Every target is the name of plain linear layers. Layers beside experts (the router, shared experts) are none:
    experts themselves are no linear layers, so the same name would adapt some projections and leave out most, and
    neither peft's files nor vLLM's adapters have one form for them."""
    head = model.get_output_embeddings()
    beside_experts = tuple(
        f"{path.rpartition('.')[0]}." for path, _ in model.named_modules() if path.endswith(".experts")
    )
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    mixed = {path.rpartition(".")[2] for path in linear if path.startswith(beside_experts)}
    plain = {path.rpartition(".")[2] for path in linear if not path.startswith(beside_experts)} - mixed
    experts = {
        part
        for path, _ in model.named_parameters()
        if path.startswith(beside_experts)
        for part in path.split(".")[-2:]
    }
    for target in config.targets:
        if target in plain - experts:
            continue
        kind = type(model).__name__
        if beside_experts and (target in mixed | experts or target in LoraConfig().targets):
            rest = ", ".join(f'"{target}"' for target in sorted(plain - experts))
            raise ConfigError(
                f"{name}: policy.lora.targets has {target!r}, which is no plain linear layer of {kind}, a mixture of "
                f"experts; adapt its attention alone, e.g. policy.lora.targets = [{rest}]"
            )
        raise ConfigError(
            f"{name}: policy.lora.targets has {target!r}; the linear layers of {kind} are "
            f"{', '.join(sorted(plain))}"
        )


def start_of(name: str, shape: Sequence[int]) -> Tensor | None:
    """What the adapter matrix `name` begins with: A (rank, H) uniform in +-1 / sqrt(H), B 0; None for other names."""
    if name.endswith(_B):
        return torch.zeros(*shape)
    if not name.endswith(_A):
        return None
    numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(*shape, generator=numbers) * (2 * bound) - bound


def has_adapters(names: Mapping[str, object]) -> bool:
    """Whether these parameter names are of a model with adapters."""
    return any(name.endswith(_A) for name in names)


def scale_of(model: Any) -> float:
    """alpha / rank of a model with adapters."""
    config = model.peft_config[_ADAPTER]
    return float(config.lora_alpha / config.r)


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A plain model's state from that of a model with adapters: W + scale B A, computed in float32, under W's name.

    Tensors without an adapter are passed on as they are; those with one are new.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((_A, _B)):
            continue
        layer, base, rest = name.partition(_BASE)
        if base and rest == "weight":
            a, b = state[layer + _A], state[layer + _B]
            tensor = torch.addmm(tensor.detach().float(), b.detach().float(), a.detach().float(), alpha=scale)
        out[f"{layer}.{rest}" if base else name] = tensor
    return out


def adapter_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B alone, under the names of a model with adapters."""
    return {name: tensor for name, tensor in state.items() if name.endswith((_A, _B))}


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base model inside the block. Gradients computed with the adapters on stay possible: parameters keep their
    requires_grad, which peft's own switch would clear."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def write_adapter(model: Any, state: Mapping[str, Tensor], folder: Path, base: str) -> None:
    """peft's two files, as its users and vLLM read them. state: of the model, whole tensors; base: the base model."""
    config = model.peft_config[_ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base, True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = False
    tensors = {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": tensor.detach().float().cpu().contiguous()
        for name, tensor in adapter_of(state).items()
    }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
