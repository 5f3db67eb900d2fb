"""New weights into the memory of the engine's model: a whole version, or what changed since the one that it holds.

Both go slice by slice, so no second model is ever held. Names, shapes and dtypes are compared before anything is
touched.

    whole   its checksums are compared before its first byte is written
    patch   applies to the version that its base names and to no other; each slice must come out with the checksum that
            its trainer gave. Where one does not, what was applied is applied once more: XOR undoes itself, and the
            model holds exactly what it held

A whole version that fails in the middle (its bytes cannot be read any more) leaves a torn model: `torn` is set until a
later one succeeds, and the engine samples nothing.

Versions of adapters come with the trainer's probe, since what they are put on is the worker's own copy of the base.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mgrpo.engines.hf.memory import Memory, memory_of
from mgrpo.engines.probe_gap import TOLERANCE, Gap
from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.model.places import Shapes
from mgrpo.model.policy import Policy
from mgrpo.model.probe import probe
from mgrpo.weights.dtypes import dtype_name
from mgrpo.weights.layout import Layout
from mgrpo.weights.patch import Change
from mgrpo.weights.version import Weights


class WeightLoader:
    """The model's memory, and the label of what it holds."""

    def __init__(self, places: Callable[[Shapes], Mapping[str, Tensor]]) -> None:
        """places: name and shape of each tensor that arrives -> the memory of those that are to be replaced; raises
        ValueError where they do not fit (mgrpo/model/places.py)."""
        self.label = ""
        """Of the version that the model holds; "" for weights that came without one."""
        self.torn = False
        self._places = places
        self._fitted: tuple[bytes, dict[int, Memory]] = b"", {}

    def copy(self, state: Mapping[str, Tensor]) -> None:
        """Replace the weights by tensors of any dtype. Raises ValueError, nothing having been changed."""
        places = self._places({name: tensor.shape for name, tensor in state.items()})
        self.label = ""
        with torch.no_grad():
            for name, tensor in places.items():
                tensor.copy_(state[name])
        self.torn = False

    def load(self, weights: Weights) -> None:
        """Make the model hold a version. Raises ValueError where names, shapes or dtypes are others than the model's,
        CorruptionError where the bytes are damaged or lead on from another version; nothing has changed then."""
        if weights.is_direct:
            raise ValueError(
                f"{weights.label} came without weights: only servers take them from the trainer's ranks"
            )
        memory = self._fit(weights.layout)
        if weights.is_whole:
            self._replace(weights, memory)
        else:
            self._patch(weights, memory)
        self.label = weights.label

    def _fit(self, layout: Layout) -> dict[int, Memory]:
        """Number of a tensor -> its memory; spare names of tied tensors have none."""
        if self._fitted[0] != layout.header:
            places = self._places({info.name: info.shape for info in layout.tensors})
            memory = {}
            for number, info in enumerate(layout.tensors):
                if info.name in places:
                    tensor = places[info.name]
                    if (held := dtype_name(tensor.dtype)) != info.dtype:
                        raise ValueError(f"weights have {info.name} as {info.dtype}, the engine holds {held}")
                    memory[number] = memory_of(tensor)
            self._fitted = layout.header, memory
        return self._fitted[1]

    def _replace(self, weights: Weights, memory: dict[int, Memory]) -> None:
        weights.verify()
        self.label, self.torn = "", True
        for piece, data in weights.slices():
            if piece.tensor in memory:
                memory[piece.tensor].write(piece, data)
        self.torn = False

    def _patch(self, weights: Weights, memory: dict[int, Memory]) -> None:
        if self.torn or not self.label or weights.base != self.label:
            held = "torn weights" if self.torn else self.label or "weights without a label"
            raise CorruptionError(f"{weights.label} is a patch of {weights.base}, the engine holds {held}")
        applied = 0
        try:
            for label, change in _changes(weights, memory):
                place = memory[change.slice.tensor]
                place.apply(change)
                applied += 1
                if not change.check(place.read(change.slice)):
                    raise CorruptionError(
                        f"{weights.layout.tensors[change.slice.tensor].name} of {label}, bytes "
                        f"{change.slice.start}..{change.slice.stop}: not the trainer's after the patch"
                    )
        except BaseException:
            self.torn = True  # until every slice is what it was
            for _, change in itertools.islice(_changes(weights, memory), applied):
                memory[change.slice.tensor].apply(change)
            self.torn = False
            raise

    def confirm(self, policy: Policy, weights: Weights) -> None:
        """Raise ConfigError where the policy, which now holds the version, differs from the trainer's; it counts as
        torn then."""
        if weights.probe is None:
            return
        gap = Gap.between(probe(policy, weights.probe.token_ids).logprobs, weights.probe)
        bound = TOLERANCE[str(policy.head_weight.dtype).removeprefix("torch.")]
        if not gap.within(bound):
            self.torn = True
            raise ConfigError(
                f"{policy.name}: with {weights.label} the engine's {gap.words(bound)}: agents.<role>.model on this "
                "machine is not the base model that the trainer adapts"
            )


def _changes(weights: Weights, memory: Mapping[int, Memory]) -> Iterator[tuple[str, Change]]:
    """Those of tensors that the model has under this name, each with the label that its patch leads to."""
    for label, changes in weights.patches():
        for change in changes:
            if change.slice.tensor in memory:
                yield label, change
