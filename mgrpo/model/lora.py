"""Low-rank adapters: each chosen linear layer W computes W x + (alpha / rank) B A x, and only A and B train.

    published weights   W + (alpha / rank) B A under the plain model's names: an engine knows nothing of adapters
    adapter             A and B alone, in peft's files
    reference policy    the same model with the adapters off

The layers are peft's, put into the model in place, so that everything else about the model stays as it was. B starts
at 0, A at numbers that follow from its layer's name alone, so that every process that loads the policy starts equal.
peft is imported when a policy has adapters.

Experts. The fused experts of a layer are one parameter (E, ., .), and a target like "experts.down_proj" gives each of
its matrices an adapter of its own rank. While the layer runs, W + (alpha / rank) B A stands in the place of W, rounded
to the precision of W: what is trained with is what is published.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config.policy import LoraConfig
from mgrpo.errors import ConfigError
from mgrpo.model.head_guard import language_model_of
from mgrpo.model.moe import experts_of

_ADAPTER = "default"
_BASE = ".base_layer"
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
    experts = [target for target in config.targets if "." in target]
    inject_adapter_in_model(
        PeftConfig(
            r=config.rank,
            lora_alpha=int(config.alpha)
            if config.alpha.is_integer()
            else config.alpha,  # others expect an int
            target_modules=[target for target in config.targets if "." not in target] or None,
            target_parameters=experts or None,
            exclude_modules=sorted(_outside(model, name)) or None,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        ),
        model,
    )
    for wrapper in _wrappers(model).values() if experts else ():
        wrapper.forward = functools.partial(_run_adapted, wrapper)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
        start = start_of(parameter_name, parameter.shape)
        if start is not None:
            with torch.no_grad():
                parameter.copy_(start)


def _outside(model: Any, name: str) -> set[str]:
    """Paths of the linear layers that token ids do not go through: those of towers for images and sound."""
    inside = {id(module) for module in language_model_of(model, name).modules()}
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and id(module) not in inside
        and module is not model.get_output_embeddings()
    }


def _check_targets(model: Any, config: LoraConfig, name: str) -> None:
    """Every target is the name of plain linear layers, or of the fused experts of a layer. Linear layers beside experts
    (the router, shared experts) are neither: the same name would adapt some projections and leave out most."""
    head = model.get_output_embeddings()
    experts = experts_of(model)
    beside_experts = tuple(f"{path.rpartition('.')[0]}." for path in experts)
    linear = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    } - _outside(model, name)
    mixed = {path.rpartition(".")[2] for path in linear if path.startswith(beside_experts)}
    plain = {path.rpartition(".")[2] for path in linear if not path.startswith(beside_experts)} - mixed
    fused = {
        f"{path.rpartition('.')[2]}.{parameter}"
        for path, module in experts.items()
        for parameter, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 3
    }
    inside = {part for target in fused for part in target.split(".")}
    for target in config.targets:
        if target in fused or target in plain - inside:
            continue
        kind = type(model).__name__
        if experts and (target in mixed | inside or target in LoraConfig().targets or "." in target):
            raise ConfigError(
                f"{name}: policy.lora.targets has {target!r}, which is no plain linear layer of {kind}, a mixture of "
                f"experts; adapt its attention, e.g. policy.lora.targets = {_list(plain - inside)}, its fused "
                f"experts, {_list(fused)}, or both"
            )
        raise ConfigError(
            f"{name}: policy.lora.targets has {target!r}; the linear layers of {kind} are "
            f"{', '.join(sorted(plain))}"
        )


def _list(targets: set[str]) -> str:
    return "[" + ", ".join(f'"{target}"' for target in sorted(targets)) + "]"


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


def merged(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A plain model's state from that of `model`, which has adapters: W + scale B A, computed in float32, under W's
    name. state: some of it at least, by names in memory, an adapted matrix with its A and B.

    Tensors without an adapter are passed on as they are; those with one are new.
    """
    scale, stacks = scale_of(model), _stacks(model)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((_A, _B)):
            continue
        layer = name.removesuffix(f"{_BASE}.weight")
        if name in stacks:
            stack = stacks[name]
            left, right = stack.factors(state[stack.layer + _A].detach(), state[stack.layer + _B].detach())
            tensor = torch.baddbmm(tensor.detach().float(), left.float(), right.float(), alpha=scale)
        elif layer != name:
            a, b = state[layer + _A], state[layer + _B]
            tensor = torch.addmm(tensor.detach().float(), b.detach().float(), a.detach().float(), alpha=scale)
        out[name.replace(_BASE, "")] = tensor
    return out


@dataclass(frozen=True, slots=True)
class _Stack:
    """The adapters of fused experts, as peft keeps them: A (E rank, in), expert after expert, and B (out, rank E), rank
    after rank."""

    layer: str
    """Name of what holds them."""
    experts: int
    rows_are_outputs: bool
    """Whether W is (E, out, in), or (E, in, out)."""

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two stacks of matrices whose products are laid out as W is."""
        a = a.reshape(self.experts, -1, a.shape[-1])  # (E, rank, in)
        b = b.reshape(b.shape[0], -1, self.experts).permute(2, 0, 1)  # (E, out, rank)
        return (b, a) if self.rows_are_outputs else (a.mT, b.mT)


def _wrappers(model: Any) -> dict[str, Any]:
    """peft's wrappers of parameters, by their names; where a module has two of them, one is inside the other."""
    from peft.tuners.lora.layer import ParamWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ParamWrapper)}


def _stack_of(wrapper: Any, name: str) -> _Stack:
    return _Stack(name, wrapper.num_experts, wrapper._did_swap_in_out_features)


def _stacks(model: Any) -> dict[str, _Stack]:
    """Of each fused parameter with adapters, by its name in memory."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(wrapper.get_base_layer())]}.{wrapper.parameter_name}": _stack_of(wrapper, name)
        for name, wrapper in _wrappers(model).items()
    }


def _run_adapted(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """The experts with adapted weights. peft's own forward makes a parametrization of the module for each call, and
    loses what stands in for a parameter meanwhile: gathered from ranks, or in another precision."""
    if wrapper.disable_adapters:
        return wrapper.base_layer(*args, **kwargs)
    parameters, name = wrapper.get_base_layer()._parameters, wrapper.parameter_name
    weight = parameters[name]
    a, b = wrapper.lora_A[_ADAPTER].weight, wrapper.lora_B[_ADAPTER].weight
    left, right = _stack_of(wrapper, name).factors(a, b)
    with torch.autocast(weight.device.type, enabled=False):  # W keeps its precision
        parameters[name] = torch.baddbmm(
            weight, left.to(weight.dtype), right.to(weight.dtype), alpha=wrapper.scaling[_ADAPTER]
        )
    try:
        return wrapper.base_layer(*args, **kwargs)
    finally:
        parameters[name] = weight


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
