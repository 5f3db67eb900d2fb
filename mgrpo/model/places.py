"""Where in a model's memory the tensors of arriving weights belong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from mgrpo.model import lora, names
from mgrpo.model.stream import own_state

Shapes = Mapping[str, Sequence[int]]
"""Name -> shape of each tensor that arrives."""


def places_of(model: Any, shapes: Shapes) -> dict[str, Tensor]:
    """The model's own memory under the names of weights in any layout of names.layouts, tied tensors once: views of the
    parameters and persistent buffers, not always contiguous. Names of `shapes` that are not in it, those of tied
    tensors, need not be loaded.

    Raises ValueError naming the first tensor that is missing, unexpected or of another shape.
    """
    whole = model.state_dict()
    if lora.has_adapters(whole):
        raise ValueError(
            "merged weights do not say what of them is adapter: the adapter's own weights are needed"
        )
    known = list(names.layouts(model, own_state(model)))
    own = next((layout for layout in known if layout.keys() <= shapes.keys()), known[0])
    memory = {tensor.untyped_storage().data_ptr() for tensor in whole.values()}
    for name, tensor in own.items():
        if tensor.untyped_storage().data_ptr() not in memory:
            raise ValueError(
                f"{name} of {type(model).__name__} lies otherwise in memory than in a checkpoint, so it cannot be "
                "replaced in place"
            )
    spare = {name for layout in names.layouts(model, whole) for name in layout}
    check_fit({name: tensor.shape for name, tensor in own.items()}, shapes, spare)
    return own


def check_fit(own: Shapes, arriving: Shapes, spare: Collection[str] = ()) -> None:
    """Raise ValueError naming the first tensor of `own` that is missing or of another shape among those that arrive, or
    the first of them that is neither in `own` nor in `spare`."""
    if missing := sorted(own.keys() - arriving.keys()):
        raise ValueError(f"weights lack {missing[0]} ({len(missing)} of {len(own)} tensors are missing)")
    for name, shape in arriving.items():
        if name in own and tuple(own[name]) != tuple(shape):
            raise ValueError(f"weights have {name} of shape {tuple(shape)}, expected {tuple(own[name])}")
    if unexpected := arriving.keys() - own.keys() - set(spare):
        raise ValueError(
            f"weights have {min(unexpected)}, which this model does not ({len(unexpected)} such tensors)"
        )
