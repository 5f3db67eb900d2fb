"""What one rank holds of the weights that it publishes, under the names of a checkpoint (mgrpo/model/stream.py).

Most published tensors are consecutive elements of one parameter in memory: the parameter itself, maybe under another
name, or one expert of a layer. Of those each rank has what FSDP gave it of dim 0, and nothing is gathered. Which they
are is found by converting tensors that have a place and no data: what shares the place of a parameter is a part of it.

The rest is made of several parameters (adapters that are merged, layouts that are transposed). Of these the sources of
one group are gathered when its first bucket is packed; rank 0 converts them, alone sends the result, and drops it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mgrpo.engines.vllm.plugin.buckets import StreamTensor
from mgrpo.errors import ConfigError
from mgrpo.model.stream import Group, PublishedTensor, WeightStream, own_state
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.shard import gather_to_main


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements of `parameter` from `offset` on; or, with parameter "", a tensor that group `group` is converted to."""

    name: str
    group: int
    parameter: str = ""
    offset: int = 0


class Parts:
    """The published tensors (`tensors`), and what this rank holds of each. A collective to make; so is prepare(), which
    every rank calls with the same arguments."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, ranks: Ranks) -> None:
        """dtype: what floating-point tensors travel in."""
        self._model, self._ranks, self._dtype = model, ranks, dtype
        self._stream = WeightStream(model)
        self._state = own_state(model)
        self._ends = _ends_of_parameters(self._state, ranks)
        self._converted: dict[int, dict[str, Tensor]] = {}  # group -> what rank 0 has at hand of it
        self._parts: list[_Part] = []
        self.tensors: list[StreamTensor] = []
        for number, group in enumerate(self._stream.groups):
            for part, published in zip(self._locate(number, group), group.published, strict=True):
                self._parts.append(part)
                self.tensors.append(self._described(part, published))

    def refresh(self) -> None:
        """Before each version: the parameters as they are now."""
        self._state = own_state(self._model)
        self._converted.clear()

    @torch.no_grad()
    def prepare(self, tensors: Sequence[int]) -> None:
        """Before these tensors are packed: gather those that a rank cannot send from what it holds. What was gathered
        for others goes."""
        needed = dict.fromkeys(part.group for part in (self._parts[i] for i in tensors) if not part.parameter)
        for number in self._converted.keys() - needed.keys():
            del self._converted[number]
        for number in needed:
            if number not in self._converted:
                group = self._stream.groups[number]
                whole = {name: gather_to_main(self._state[name]).detach() for name in group.sources}
                self._converted[number] = self._stream.convert(group, whole) if self._ranks.is_main else {}

    def held(self, number: int) -> Tensor:
        """What this rank sends of tensor `number`, flattened, sharing the parameter's memory where it can."""
        part, ends, rank = self._parts[number], self.tensors[number].ends, self._ranks.rank
        if not part.parameter:
            return self._converted[part.group][part.name].reshape(-1)
        begin, end = (ends[rank - 1] if rank else 0), ends[rank]
        tensor = self._state[part.parameter].detach()
        if not isinstance(tensor, DTensor):
            return tensor.reshape(-1)[part.offset + begin : part.offset + end]
        ours = self._ends[part.parameter]
        first = part.offset + begin - (ours[rank - 1] if rank else 0)
        return tensor.to_local().reshape(-1)[first : first + end - begin]

    def _locate(self, number: int, group: Group) -> list[_Part]:
        """Where the published tensors of a group lie, in their order."""
        found = {group.published[0].name: (group.sources[0], 0)} if group.as_it_is else self._pieces(group)
        if not all(name in self._ends for name, _ in found.values()):
            found = {}  # divided in another way than along dim 0
        return [_Part(p.name, number, *found.get(p.name, ("", 0))) for p in group.published]

    def _pieces(self, group: Group) -> dict[str, tuple[str, int]]:
        """The published tensors as (source, offset) of consecutive elements; {} where one of them is none."""
        blank = {
            name: torch.empty(self._state[name].shape, dtype=self._state[name].dtype, device="meta")
            for name in group.sources
        }
        places = {tensor.untyped_storage()._cdata: name for name, tensor in blank.items()}
        found = {}
        for name, tensor in self._stream.convert(group, blank).items():
            source = places.get(tensor.untyped_storage()._cdata)
            if source is None or not tensor.is_contiguous() or tensor.dtype != blank[source].dtype:
                return {}
            found[name] = source, int(tensor.storage_offset())
        return found

    def _described(self, part: _Part, published: PublishedTensor) -> StreamTensor:
        size = torch.Size(published.shape).numel()
        ends = [size] * self._ranks.size
        if part.parameter:
            ends = [min(max(end - part.offset, 0), size) for end in self._ends[part.parameter]]
        dtype = self._dtype if published.dtype.is_floating_point else published.dtype
        return StreamTensor(published.name, str(dtype).removeprefix("torch."), published.shape, tuple(ends))


def _ends_of_parameters(state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[int]]:
    """Of each parameter that rank 0 has whole, or that is divided along dim 0 only: where each rank's elements end."""
    own = {
        name: tensor.to_local().numel()
        for name, tensor in state.items()
        if isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)
    }
    sizes = ranks.gather(own)
    ends: dict[str, list[int]] = {}
    for name, tensor in state.items():
        if name in own:
            last, found = 0, []
            for of_rank in sizes:
                found.append(last := last + of_rank[name])
            if last != tensor.numel():
                raise ConfigError(
                    f"{name}: the ranks hold {last} elements of {tensor.numel()}; direct weights need them once each"
                )
            ends[name] = found
        elif not isinstance(tensor, DTensor):
            ends[name] = [tensor.numel()] * ranks.size
    return ends
