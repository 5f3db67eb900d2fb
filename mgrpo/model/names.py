"""Names of weights outside of a model: transformers keeps some architectures otherwise in memory than on disk (the
experts of a layer as one tensor, a layer under another name). Engines, final policies and other programs know the names
on disk only. The conversions are transformers' own, those of save_pretrained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def published(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state`, under names in memory, as a checkpoint has it: in the layout that the model was loaded from, or its
    architecture's own. What a conversion only cuts out or renames shares the memory of `state`."""
    from transformers.core_model_loading import revert_weight_conversion

    with _Views():
        out: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return out


def layouts(model: Any, state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """`state` in every layout that may arrive: published() first. The sender may have been loaded from a checkpoint
    with another prefix, or from one that has the names in memory."""
    yield published(model, state)
    from transformers.conversion_mapping import get_model_conversion_mapping

    with _conversions(model, get_model_conversion_mapping(model, add_legacy=False)):
        yield published(model, state)
    yield dict(state)


@contextlib.contextmanager
def _conversions(model: Any, conversions: list[Any]) -> Iterator[None]:
    """The model as if it had been loaded by these conversions."""
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = conversions
    try:
        yield
    finally:
        model._weight_conversions = before


class _Views(TorchFunctionMode):
    """Cutting a tensor makes views, where transformers would copy each piece."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))
