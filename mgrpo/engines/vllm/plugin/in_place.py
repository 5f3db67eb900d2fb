"""A patch into a model that runs: the model's own loader finds the place of each weight, XOR changes its bits.

The loader gets, tensor after tensor under checkpoint names, XOR bits in the weights' own dtype, zero where nothing
changed. It cuts them for its tensor-parallel rank and picks the place in a fused parameter, as it does with weights;
the copy into the parameter at its end is replaced by XOR. That holds for a copy that neither converts nor computes, of
a view of the very bits given; any other is refused by name. One tensor's bits are in memory at a time.

    version   q_proj [4096, 4096]  --loader-->  rows of this rank  --XOR-->  qkv_proj[0:512]

What was written is read back through the same views, so the checksum of each changed slice can be compared with that of
the trainer's bytes wherever one worker holds whole tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mgrpo.errors import CorruptionError
from mgrpo.weights.dtypes import bits_dtype, torch_dtype
from mgrpo.weights.layout import Layout, TensorInfo
from mgrpo.weights.patch import Change


class Unfit(Exception):
    """This model's loader cannot take a patch, or not this one."""


class InPlace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One patch on its way into `model`. `written`: elements changed or rewritten so far; once it is not 0, a failure
    leaves old and new weights mixed. `storages`: data pointers of the memory that they lie in."""

    def __init__(self, model: Any, layout: Layout, *, whole: bool) -> None:
        """whole: this worker holds every tensor whole, so all of each must be taken, and checksums are compared."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = 0
        self.storages: set[int] = set()
        self._model, self._layout, self._whole = model, layout, whole
        self._device = next(model.parameters()).device
        self._bits: torch.Tensor | None = None  # of the tensor that is under way
        self._name = ""
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (in the model, the view of the bits)

    def apply(self, changes: Iterable[Change]) -> None:
        """Raises Unfit naming a tensor that the loader treats in a way of its own, CorruptionError for a damaged
        change or a result that is not the trainer's."""
        with torch.no_grad(), self:
            # As few calls as can be: each looks up all parameters of the model.
            self._model.load_weights(self._tensors(changes))
        if self._copies or self._bits is not None:
            raise Unfit(f"the loader of {type(self._model).__name__} stopped at {self._name}")

    def _tensors(self, changes: Iterable[Change]) -> Iterator[tuple[str, torch.Tensor]]:
        for number, own in itertools.groupby(changes, lambda change: change.slice.tensor):
            info, pieces = self._layout.tensors[number], list(own)
            self._name, self._bits = info.name, self._bits_of(info, pieces)
            yield info.name, self._bits
            self._finish(info, pieces)

    def _bits_of(self, info: TensorInfo, changes: list[Change]) -> torch.Tensor:
        try:
            bits = torch.zeros(info.shape, dtype=torch_dtype(info.dtype), device=self._device)
        except ValueError as error:
            raise Unfit(f"{info.name} has no patches: {error}") from None
        flat = bits.view(-1).view(bits_dtype(info.itemsize))
        for change in changes:
            indices, values = change.entries()
            places = torch.from_numpy(indices + change.slice.start // info.itemsize).to(self._device)
            # A copy: torch takes no read-only memory, nor one element with strides of its own.
            moved = torch.frombuffer(bytearray(values.tobytes()), dtype=flat.dtype)
            flat[places] = moved.to(self._device)
        return bits

    def _finish(self, info: TensorInfo, changes: list[Change]) -> None:
        """The loader asks for the next tensor: it is done with this one."""
        bits, copies = self._bits, self._copies
        self._bits, self._copies = None, []
        if not self._whole:
            return
        assert bits is not None
        if sum(place.numel() for place, _ in copies) < bits.numel():
            raise Unfit(
                f"{info.name}: the loader of {type(self._model).__name__} has not taken it as it came"
            )
        for place, view in copies:
            view.copy_(place)
        raw = bits.view(-1).view(torch.uint8)
        for change in changes:
            if not change.check(raw[change.slice.start : change.slice.stop].cpu().numpy()):
                raise CorruptionError(f"{info.name}: after the patch its bytes are not the trainer's")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default or self._bits is None:  # None: our own work between two
            return func(*args, **(kwargs or {}))
        place, source = args[0], args[1]
        if source.untyped_storage().data_ptr() != self._bits.untyped_storage().data_ptr():
            raise Unfit(f"{self._name}: its loader computes what it stores")
        if place.shape != source.shape or place.dtype != source.dtype:
            raise Unfit(
                f"{self._name} is {source.dtype} {list(source.shape)} in the patch, {place.dtype} {list(place.shape)} "
                "in the model"
            )
        bits = bits_dtype(place.element_size())
        place.view(bits).bitwise_xor_(source.view(bits))
        self.written += place.numel()
        self.storages.add(place.untyped_storage().data_ptr())
        self._copies.append((place, source))
        return place
