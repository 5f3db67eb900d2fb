"""A model's weights from the files of a checkpoint, of which each rank reads what it holds.

    files  --slices-->  a part of one tensor, or of those that are fused  --rename, convert-->  the rank's memory

Which tensors of the files make which in memory follows transformers' own rules (core_model_loading.py), from the names
alone; what comes out of a conversion is found by running it over tensors that have a shape and no data. So a checkpoint
of another model is refused before anything is read. In memory is never more than one tensor of the model beside what
stays: of fused experts those that the rank holds.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mgrpo.errors import ConfigError
from mgrpo.model.stream import own_state
from mgrpo.model.weight_slices import StoredTensor, WeightFiles

_BASE = "base_layer"  # what peft puts before the last part of an adapted layer's name, twice in fused experts


@dataclass(slots=True)
class _Unit:
    """Tensors of the files that are read together."""

    sources: list[tuple[str, StoredTensor]] = field(default_factory=list)
    """With the pattern of the conversion that each takes part in."""
    conversion: Any = None
    """transformers' WeightConverter; None for one tensor that changes its name at most."""
    made: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Names in memory and shapes of what comes out of it."""


class Parts:
    """How the tensors of `files` become those of a model."""

    def __init__(self, model: Any, files: WeightFiles) -> None:
        """model: a transformers model on the meta device, without adapters; it remembers the conversions, by which its
        weights leave it again. Raises ConfigError where names or shapes are not the model's."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self._files, self._model_class = files, model
        self._conversions = get_model_conversion_mapping(model)
        self._by_pattern = {
            pattern: conversion
            for conversion in self._conversions
            if isinstance(conversion, WeightConverter)
            for pattern in conversion.source_patterns
        }
        own = own_state(model)
        every = model.state_dict()
        self._units = self._assigned(model, every)
        model._weight_conversions = [c for c in self._conversions if c.was_used()]
        self._aliases = self._shared(model, own, every)
        self._check(own)

    def _assigned(self, model: Any, every: Mapping[str, Tensor]) -> dict[str, _Unit]:
        """By the name in memory, the first one where several come of it. Names that are not the model's are left out,
        as transformers leaves them."""
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        renamings = [c for c in self._conversions if not isinstance(c, WeightConverter)]
        units: dict[str, _Unit] = {}
        for name in sorted(self._files.tensors, key=dot_natural_key):
            prefix = model.base_model_prefix
            target, pattern = rename_source_key(name, renamings, converters, prefix, every)
            if target not in every and name in every:
                target, pattern = rename_source_key(name, [], [], prefix, every)
            if target not in every:
                continue
            unit = units.setdefault(target, _Unit())
            unit.conversion = None if pattern is None else self._by_pattern[pattern]
            unit.sources.append((pattern or name, self._files.tensors[name]))
        for target, unit in units.items():
            unit.made = {n: tuple(t.shape) for n, t in self._run(target, unit, StoredTensor.blank).items()}
        return units

    def _run(self, target: str, unit: _Unit, read: Callable[..., Tensor | None]) -> dict[str, Tensor]:
        """What comes out of a unit. read(stored, number=i): the i-th tensor of its pattern, None for nothing of it."""
        if unit.conversion is None:
            found = read(unit.sources[-1][1])
            return {} if found is None else {target: found}
        conversion, numbers = copy.deepcopy(unit.conversion), dict.fromkeys(dict(unit.sources), -1)
        for pattern, stored in unit.sources:
            numbers[pattern] += 1
            given = {} if read is StoredTensor.blank else {"number": numbers[pattern]}
            conversion.add_tensor(target, stored.name, pattern, functools.partial(read, stored, **given))
        model = self._model_class
        try:
            made = conversion.convert(target, model=model, config=model.config)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"policy folder {self._files.folder}: {target} cannot be made of the {len(unit.sources)} tensors "
                f"that begin with {unit.sources[0][1].name}: {' '.join(str(error).split())}"
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _shared(self, model: Any, own: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> dict[str, str]:
        """Second names of tied parameters -> their first ones."""
        first = {id(p): name for name, p in model.named_parameters()}
        return {
            name: first[id(p)]
            for name, p in model.named_parameters(remove_duplicate=False)
            if name in every and name not in own and id(p) in first
        }

    def _check(self, own: Mapping[str, Tensor]) -> None:
        made = {name: shape for unit in self._units.values() for name, shape in unit.made.items()}
        folder = self._files.folder
        for name, shape in sorted(made.items()):
            expected = own.get(self._aliases.get(name, name))
            if expected is not None and shape != tuple(expected.shape):
                raise ConfigError(
                    f"policy folder {folder}: {name} has shape {shape}, config.json says {tuple(expected.shape)}"
                )
        there = made.keys() | {self._aliases[name] for name in made if name in self._aliases}
        if missing := sorted(own.keys() - there):
            raise ConfigError(
                f"policy folder {folder}: its weights lack {missing[0]} ({len(missing)} tensors are missing)"
            )

    @torch.no_grad()
    def read_into(self, model: Any) -> None:
        """Fill the memory of `model`, the one of the beginning, meanwhile sharded, adapted, frozen and allocated. Each
        rank reads its part. Raises ConfigError where tied tensors are not equal, and as reading does."""
        memory = _memory(model)
        late = [name for name in self._units if name in self._aliases]
        first = {self._aliases[name] for name in late if self._aliases[name] not in self._units}
        for target in [*(name for name in self._units if name not in late), *late]:
            for name, value in self._read(target, memory):
                place = memory[self._aliases.get(name, name)]
                own = place.to_local() if isinstance(place, DTensor) else place
                if name in self._aliases and self._aliases[name] not in first:
                    if not torch.equal(own, value.to(own)):
                        raise ConfigError(
                            f"policy folder {self._files.folder}: {name} and {self._aliases[name]} differ, which are "
                            "one tensor by config.json; mend tie_word_embeddings there"
                        )
                    continue
                own.copy_(value)

    def _read(self, target: str, memory: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """This rank's parts of what a unit makes."""
        unit = self._units[target]
        places = {name: memory[self._aliases.get(name, name)] for name in unit.made}
        if all(isinstance(p, DTensor) and not p.to_local().numel() for p in places.values()):
            return
        first = places[target]
        sliced = unit.conversion is None or all(_commutes(op) for op in unit.conversion.operations)
        sliced = sliced and all(_along_first(place) for place in places.values() if unit.conversion)
        if sliced:
            yield from self._run(target, unit, functools.partial(_part, first)).items()
            return
        for name, value in self._run(target, unit, lambda stored, number=None: stored[...]).items():
            part = _part(places[name], value)
            assert part is not None
            yield name, part


def part_of(place: Tensor, whole: Tensor | StoredTensor) -> Tensor:
    """What of a whole tensor lies at `place`, a tensor of a sharded model: a rank's part, or all of it."""
    part = _part(place, whole)
    assert part is not None
    return part


def _part(place: Tensor, stored: Tensor | StoredTensor, number: int | None = None) -> Tensor | None:
    """number: `stored` is that one of tensors that are stacked, whose stack lies at `place`; None where nothing of it
    does."""
    if not isinstance(place, DTensor):
        return stored[...]
    from transformers.distributed.sharding_utils import DtensorShardOperation

    part: Tensor | None = DtensorShardOperation(place).shard_tensor(stored, tensor_idx=number)
    return part


def _commutes(operation: Any) -> bool:
    """Whether a part, along the first dimension, of what a conversion makes is made of parts alone."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if isinstance(operation, MergeModulelist):
        return operation.dim == 0  # type: ignore[no-any-return]
    return isinstance(operation, Concatenate) and operation.dim > 0


def _along_first(place: Tensor) -> bool:
    """Whether a tensor is whole or cut along its first dimension alone, in one piece."""
    return not isinstance(place, DTensor) or all(
        not p.is_partial() and (p.is_replicate() or p.is_shard(0)) for p in place.placements
    )


def _memory(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers under the names of the model without adapters."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name.replace(f".{_BASE}", ""): tensor for name, tensor in found.items()}
