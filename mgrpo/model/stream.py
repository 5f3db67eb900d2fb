"""A policy's weights as they leave it: tensor after tensor under the names of a checkpoint, never all at once.

    in memory (sharded, with adapters, experts fused)  --gather-->  one group, whole  --convert-->  published tensors

A group is the least that must be there together: one tensor mostly; a matrix and its adapter; the tensors that one of
transformers' conversions (names.py) takes apart or joins. Which they are, and what comes out of them, is found once,
without memory: the conversion of all names runs over tensors that have a shape and no data, and each remembers which
tensors it was made of.

Everything follows from the model's structure, so ranks that hold parts of one model walk through it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from mgrpo.model import lora, names


@dataclass(frozen=True, slots=True)
class PublishedTensor:
    """What is known of a tensor before it is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are made of the same ones in memory."""

    sources: tuple[str, ...]
    """Names in memory of all that must be whole at one time."""
    published: tuple[PublishedTensor, ...]
    as_it_is: bool
    """One tensor that changes its name at most."""


class WeightStream:
    """The order and the layout in which a model's weights leave it."""

    def __init__(self, model: Any, adapter_only: bool = False) -> None:
        """model: a transformers model, whole or sharded; it keeps its structure. adapter_only: the adapters alone,
        under their names in memory."""
        self._model = model
        self._adapter_only = adapter_only
        self._blank = {
            name: _Traced.of(name, tensor) for name, tensor in own_state(model, adapter_only).items()
        }
        found = self._converted(self._blank)
        order = {name: i for i, name in enumerate(self._blank)}
        self.groups = tuple(
            self._group(sorted(sources, key=order.__getitem__), found)
            for sources in _joined(self._blank, [tensor.sources for tensor in found.values()])
        )
        self._needs_all_names = {
            group.sources for group in self.groups if not group.as_it_is and not self._stands_alone(group)
        }

    @property
    def tensors(self) -> tuple[PublishedTensor, ...]:
        """All of them, in the order in which read() gives them."""
        return tuple(tensor for group in self.groups for tensor in group.published)

    def read(self, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Reading:
        """The weights as they are now. gather: makes a sharded tensor whole; where it is a collective, every rank
        reads to the end or calls finish()."""
        return Reading(self, own_state(self._model, self._adapter_only), gather)

    def convert(self, group: Group, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `group` publishes, from its sources, whole, by their names in memory."""
        if group.as_it_is:
            return {group.published[0].name: whole[group.sources[0]]}
        state = {**self._blank, **whole} if group.sources in self._needs_all_names else dict(whole)
        found = self._converted(state)
        return {tensor.name: found[tensor.name] for tensor in group.published}

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        if self._adapter_only:
            return dict(state)
        plain = lora.merged(state, self._model) if lora.has_adapters(state) else state
        return names.published(self._model, plain)

    def _group(self, sources: list[str], found: Mapping[str, Any]) -> Group:
        made = {name: tensor for name, tensor in found.items() if tensor.sources <= set(sources)}
        as_it_is = len(made) == len(sources) == 1 and next(iter(made.values())) is self._blank[sources[0]]
        published = (PublishedTensor(n, t.dtype, tuple(t.shape)) for n, t in made.items())
        return Group(tuple(sources), tuple(published), as_it_is)

    def _stands_alone(self, group: Group) -> bool:
        """Whether its conversion gives the same names without the other tensors' names; some look at all of them."""
        try:
            found = self._converted({name: self._blank[name] for name in group.sources})
        except (KeyError, ValueError, RuntimeError, IndexError):
            return False
        return {(t.name, t.dtype, t.shape) for t in group.published} == {
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()
        }


class Reading(Iterator[tuple[str, Tensor]]):
    """One walk through a stream: (name, whole tensor), contiguous, sharing the model's memory where the layout allows.
    A tensor is good until the next one is asked for, and nobody writes to it."""

    def __init__(
        self, stream: WeightStream, state: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]
    ) -> None:
        self._stream, self._state, self._gather = stream, state, gather
        self._groups = iter(stream.groups)
        self._tensors: Iterator[tuple[str, Tensor]] = iter(())
        self._complete = self._abandoned = False

    def __next__(self) -> tuple[str, Tensor]:
        if self._abandoned:
            raise RuntimeError(
                "these weights are not complete: something else was begun before all were read"
            )
        while True:
            for item in self._tensors:
                return item
            self._tensors = iter(())  # what is behind us must be gone before the next group is gathered
            group = next(self._groups, None)
            if group is None:
                self._complete = True
                raise StopIteration
            self._tensors = self._read(group)

    def finish(self) -> None:
        """Take part in what is left of a collective, and keep nothing."""
        self._tensors, self._abandoned = iter(()), not self._complete
        for group in self._groups:
            for name in group.sources:
                self._gather(self._state[name])

    @torch.no_grad()
    def _read(self, group: Group) -> Iterator[tuple[str, Tensor]]:
        found = self._stream.convert(
            group, {name: self._gather(self._state[name]).detach() for name in group.sources}
        )
        return _popped(found)


def _popped(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in list(tensors):
        yield name, tensors.pop(name).contiguous()


def own_state(model: torch.nn.Module, adapter_only: bool = False) -> dict[str, Tensor]:
    """Parameters and persistent buffers under the names in memory, tied ones once, sharing the model's memory."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return lora.adapter_of(state) if adapter_only else state


class _Traced(Tensor):
    """A tensor without data that knows which tensors it was computed from."""

    sources: frozenset[str]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Traced:
        blank = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(cls)
        blank.sources = frozenset([name])
        return blank

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        made = [tensor for tensor in tree_iter(out) if isinstance(tensor, cls)]
        if made:
            given = [
                t.sources for t in tree_iter((args, kwargs)) if isinstance(t, cls) and hasattr(t, "sources")
            ]
            for tensor in made:
                tensor.sources = frozenset().union(*given)
        return out


def _joined(all_names: Iterable[str], together: Iterable[frozenset[str]]) -> list[set[str]]:
    """The names that are connected through the sets of `together`, in the order of each group's first name."""
    group_of: dict[str, set[str]] = {}
    for linked in together:
        merged = set(linked).union(*(group_of[name] for name in linked if name in group_of))
        group_of |= dict.fromkeys(merged, merged)
    unique = {id(group_of[name]): group_of[name] for name in all_names if name in group_of}
    return list(unique.values())
