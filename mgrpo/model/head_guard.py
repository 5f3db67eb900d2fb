"""Whether a model's logits are its final hidden states times its head, and nothing else: what the fused loss computes.

Judged three ways, since freshly made weights are small and hide what large ones show: by the configuration (a soft cap,
a scale), by the parameters that the model has behind its backbone (a bias, a second norm), and by numbers, with hidden
states scaled until the logits are larger than any cap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mgrpo.errors import ConfigError
from mgrpo.model import architecture

_ADVICE = "; the fused loss would train another model"
_MAGNITUDES = (1e2, 1e4)  # of the largest logit: soft caps lie at 15 to 50


def backbone_of(model: Any, name: str) -> Any:
    """The module of a causal language model that ends in its final hidden states. Raises ConfigError."""
    for found in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if isinstance(found, nn.Module) and found is not model:
            return found
    raise ConfigError(f"{name}: {type(model).__name__} has no backbone below its head")


def head_of(model: Any, name: str) -> Any:
    """The module whose weight (V, H) makes the logits. Raises ConfigError where it is none that can be trained."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"{name}: {type(model).__name__} has no output head, expected a causal language model"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ConfigError(
            f"{name}: the head of {type(model).__name__} is a {type(head).__name__}, expected one matrix "
            "(vocabulary, hidden size)"
        )
    if not weight.is_floating_point():
        raise ConfigError(f"{name}: the head's weight is {weight.dtype}; take weights that are not quantised")
    return head


def check_structure(model: Any, backbone: Any, head: Any, name: str) -> None:
    """What the configuration and the parameters say, which may lie on the meta device. Raises ConfigError as
    check_head."""
    refused = _refused(model, name)
    if setting := architecture.after_head(model.config.to_dict()):
        raise ConfigError(f"{refused}config.json has {setting}{_ADVICE}")
    if extra := _behind(model, backbone, head):
        raise ConfigError(f"{refused}it has {extra} behind its backbone{_ADVICE}")


@torch.no_grad()
def check_head(
    model: Any,
    backbone: Any,
    head: Any,
    states: Callable[..., Tensor],
    name: str,
    weight: Tensor | None = None,
) -> None:
    """states: backbone arguments -> final hidden states, as the trainer computes them; weight: the head's, where the
    head does not hold it whole. Raises ConfigError naming the model and what stands between them and its logits."""
    check_structure(model, backbone, head, name)
    kind, refused = type(model).__name__, _refused(model, name)
    weight = head.weight if weight is None else weight
    ids = torch.arange(min(4, weight.shape[0]), device=weight.device)[None]
    try:
        logits, caller, output = _watched(model, backbone, ids)
        hidden = states(input_ids=ids)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{name}: {kind} computes no logits from token ids alone: {error}") from error
    _compare(hidden, logits, weight, refused)
    if caller is None:
        raise ConfigError(f"{refused}they do not come through its {type(backbone).__name__}{_ADVICE}")
    largest = float((hidden @ weight.to(hidden.dtype).T).abs().max())
    for magnitude in _MAGNITUDES if largest > 0 else ():
        scaled = hidden * (magnitude / largest)
        _compare(scaled, _logits_of(model, caller, output, scaled, ids), weight, refused)


def _refused(model: Any, name: str) -> str:
    return f"{name}: the logits of {type(model).__name__} are not hidden @ head.T: "


def _watched(model: Any, backbone: Any, ids: Tensor) -> tuple[Tensor, Any, Any]:
    """The model's logits, and which module it got its hidden states from, with what that module answered: the backbone
    or, where the model goes past it, its decoder."""
    seen: list[tuple[Any, Any]] = []
    watches = [
        module.register_forward_hook(lambda module, _arguments, output: seen.append((module, output)))
        for module in {backbone, model.get_decoder()}
        if isinstance(module, nn.Module) and module is not model
    ]
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        for watch in watches:
            watch.remove()
    return logits, *(seen[-1] if seen else (None, None))  # an outer module answers last


def _behind(model: Any, backbone: Any, head: Any) -> str | None:
    """The first parameter or buffer that is neither of the backbone nor the head's weight."""
    inside = {id(tensor) for tensor in (*backbone.parameters(), *backbone.buffers(), head.weight)}
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if id(tensor) not in inside), None)


def _logits_of(model: Any, backbone: Any, output: Any, states: Tensor, ids: Tensor) -> Tensor:
    """The model's logits of given hidden states: its backbone answers with them without computing."""
    given = (states, *output[1:]) if type(output) is tuple else type(output)(last_hidden_state=states)
    before = backbone.__dict__.get("forward")  # where its class's own is wrapped
    backbone.forward = lambda *_, **__: given
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        del backbone.forward
        if before is not None:
            backbone.forward = before
    return logits


def _compare(states: Tensor, logits: Tensor, weight: Tensor, refused: str) -> None:
    ours = states @ weight.to(states.dtype).T
    if ours.shape != logits.shape:
        raise ConfigError(f"{refused}they have shape {tuple(logits.shape)}, not {tuple(ours.shape)}{_ADVICE}")
    size = float(ours.abs().max())
    off = float((ours - logits).abs().max())
    if not off <= (1e-3 if weight.dtype == torch.float32 else 3e-2) * size + 1e-6:
        raise ConfigError(
            f"{refused}where the largest logit is {size:.3g} they differ by {off:.3g} (a bias, scale or soft cap "
            f"follows its head){_ADVICE}"
        )
