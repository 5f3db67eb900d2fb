"""How many bytes of tensors are alive: a dispatch mode that looks at the storages that operations return.

torch's own trackers (torch.distributed._tools.mem_tracker) sort what they see into kinds and book temporaries of
foreach operations as optimizer state; here a storage counts from the operation that returns it to its end, whatever it
is for, so the peak is one of bytes that are there at one time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """`live` now, `peak` so far. What an operation holds only while it runs is not seen, but for operations with an
    entry in `scratch`."""

    def __init__(self, scratch: Mapping[str, Callable[[tuple[Any, ...]], int]] | None = None) -> None:
        """scratch: name of an operator, e.g. "mgrpo::linear_grpo_loss" -> (its arguments) -> bytes that it allocates
        for itself."""
        super().__init__()
        self.live = self.peak = 0
        self.counting = True
        self._scratch = scratch or {}
        self._held: dict[int, int] = {}  # by the storage's id
        self._resize: Any = None

    def __enter__(self) -> LiveBytes:
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            found = resize(storage, size)
            if id(storage) in self._held:
                self._count(id(storage), storage.nbytes())
            return found

        # FSDP lets gathered weights go by resizing their storage, which no operation shows.
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass(x) for x in tree_iter((args, kwargs))):
            return NotImplemented  # a DTensor takes itself apart first, and its parts come by here
        return self.count(func, args, self.run(func, args, kwargs or {}))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def count(self, func: Any, args: tuple[Any, ...], found: Any) -> Any:
        """Take in what an operation returned."""
        if not self.counting:
            return found
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if (needs := self._scratch.get(func.name().partition(".")[0])) is not None:
            self.peak = max(self.peak, self.live + needs(args))
        return found

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage from now on, once."""
        if is_traceable_wrapper_subclass(tensor):  # a DTensor: its parts are counted
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._held:
            self._held[key] = 0
            weakref.finalize(storage, self._free, key)
        self._count(key, storage.nbytes())

    def _count(self, key: int, size: int) -> None:
        self.live += size - self._held[key]
        self._held[key] = size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._held.pop(key, 0)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once; of a DTensor: of this rank's part."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
