"""Several policies in one process that are adapters of one base model: the base is held once.

An adapted layer computes W x + (alpha / rank) B A x. The base has W; each policy has its own A and B (float32) and adds
its second term, by a hook on the layer, in its own forwards alone. All forwards run on the event loop's thread, one
after the other, so policies never mix.

Adapters arrive alone, so the base comes from the folder agents.<role>.model of the worker's machine. It is rounded as
the trainer rounds what it freezes (policy.dtype, head_dtype), so that both multiply by the same numbers. Agents share a
base where folder, device and dtypes are the same; it goes with the last engine that uses it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mgrpo.config import AgentView
from mgrpo.config.engine import HfEngineConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.model.places import Shapes, check_fit
from mgrpo.model.policy import Policy
from mgrpo.model.policy_files import tokenizer_from_files
from mgrpo.model.precision import kept_in_half


class Base:
    """A model without adapters, and the roles that have one on it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.roles: set[str] = set()


_bases: WeakValueDictionary[tuple[object, ...], Base] = WeakValueDictionary()


class Adapter:
    """One policy's A and B on the layers of a base. Adds nothing outside of on()."""

    def __init__(self, model: Any, config: LoraConfig, name: str) -> None:
        """A and B are 0 until they are loaded. name: how errors call the policy. Raises ConfigError."""
        self._scale, self._active = config.alpha / config.rank, False
        self._own: dict[str, Tensor] = {}
        head = model.get_output_embeddings()
        for path, layer in model.named_modules():
            if (
                path.rpartition(".")[2] in config.targets
                and isinstance(layer, nn.Linear)
                and layer is not head
            ):
                device = layer.weight.device
                a = torch.zeros(config.rank, layer.in_features, device=device)
                b = torch.zeros(layer.out_features, config.rank, device=device)
                self._own |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
                layer.register_forward_hook(functools.partial(self._add, a, b))
        if not self._own:
            raise ConfigError(f"{name}: no layer of {type(model).__name__} is one of policy.lora.targets")

    def _add(
        self, a: Tensor, b: Tensor, layer: nn.Module, arguments: tuple[Tensor], out: Tensor
    ) -> Tensor | None:
        if not self._active:
            return None
        low = nn.functional.linear(arguments[0].to(a.dtype), a)
        return (out + nn.functional.linear(low, b) * self._scale).to(out.dtype)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside the block the base computes as this policy."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def places(self, shapes: Shapes) -> dict[str, Tensor]:
        """The memory of A and B under the names that arrive, peft's or those of the trainer's model. Raises ValueError
        as places_of."""
        arriving = {name.replace(".default.", ".").removeprefix("base_model.model."): name for name in shapes}
        own = {name: tensor.shape for name, tensor in self._own.items()}
        check_fit(own, {plain: shapes[name] for plain, name in arriving.items()})
        return {arriving[plain]: tensor for plain, tensor in self._own.items()}


class AdaptedPolicy(Policy):
    """A policy on a base that it shares."""

    def __init__(self, base: Base, adapter: Adapter, tokenizer: Any, name: str, config: PolicyConfig) -> None:
        self._base, self.adapter = base, adapter
        super().__init__(base.model, tokenizer, name, config)

    def _states(self, **arguments: Any) -> Tensor:
        with self.adapter.on():
            return super()._states(**arguments)

    def step(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        with self.adapter.on():
            return super().step(input_ids, mask, positions, cache)


def open_adapter(view: AgentView, files: Mapping[str, bytes]) -> AdaptedPolicy:
    """The agent's policy, its base loaded or found. files: as of policy_files. Raises ConfigError naming the setting
    where the base model is not there."""
    role, owner, engine = view.role, view.owner, view.owner.engine
    assert isinstance(engine, HfEngineConfig)
    tokenizer, _ = tokenizer_from_files(files, role)
    folder = Path(owner.model or "")
    key = (folder.resolve(), engine.device, engine.dtype, owner.policy.dtype, owner.policy.head_dtype)
    base = _bases.get(key)
    if (
        base is None or role in base.roles
    ):  # a role's second engine is of another run: the folder may be another too
        base = _bases[key] = _load(view, folder)
    base.roles.add(role)
    # sdpa: the engine brings masks of its own, which packed attention does not take
    config = PolicyConfig(device=engine.device, attention="sdpa", share_prefixes=False)
    return AdaptedPolicy(base, Adapter(base.model, owner.policy.lora, role), tokenizer, role, config)


def _load(view: AgentView, folder: Path) -> Base:
    engine = view.owner.engine
    assert isinstance(engine, HfEngineConfig)
    try:
        model = load_policy(folder).model
    except ConfigError as error:
        raise ConfigError(
            f"agents.{view.owner_role}.engine.adapters: the rollout worker takes the base model from "
            f"agents.{view.owner_role}.model, and {error}"
        ) from error
    round_frozen(model, view.owner.policy)
    model.requires_grad_(False)
    return Base(model.to(device=engine.device, dtype=getattr(torch, engine.dtype)))


@torch.no_grad()
def round_frozen(model: Any, config: PolicyConfig) -> None:
    """Round what a trainer of this configuration keeps in half precision, since it freezes it."""
    for parameter in kept_in_half(model, config):
        parameter.copy_(parameter.bfloat16())
