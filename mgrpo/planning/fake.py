"""Tensors without data, so that a trainer's own code runs for a model of any size on any machine.

What has the size of a model is fake: shape, dtype and a storage that counts and holds nothing. What steers the code is
real: token ids, lengths, masks and borders of a micro-batch lie in main memory and are computed with, so nothing that
depends on their values is guessed. A number read out of a fake tensor is 0, a yes or no is yes; what looks for any bad
value finds none, and what counts rows counts all.

Tensors for "cuda" are fake tensors of the CPU: their bytes are the same, and no machine here needs a driver. What the
code chooses by the device (an attention, a chunk of the head) is chosen by the policy's device, which says "cuda".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._pytree import tree_iter

from mgrpo.planning.live import LiveBytes

_PROPAGATE = "_propagate_tensor_meta_non_cached"
_STEERING = 1 << 24  # elements of an integer or a mask up to which it is real
aten = torch.ops.aten


class FakeTensors(LiveBytes):  # type: ignore[no-untyped-call]
    """Use as a context manager around everything that makes or touches the model."""

    def __init__(self, scratch: Mapping[str, Callable[[tuple[Any, ...]], int]] | None = None) -> None:
        super().__init__(scratch)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> FakeTensors:
        super().__enter__()
        self._propagate = propagate = getattr(ShardingPropagator, _PROPAGATE)

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            before, self.counting = self.counting, False
            try:
                return propagate(*args, **kwargs)
            finally:
                self.counting = before

        # A DTensor finds the shape of a result out by running the operation on whole tensors that nobody has.
        setattr(ShardingPropagator, _PROPAGATE, uncounted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        setattr(ShardingPropagator, _PROPAGATE, self._propagate)
        super().__exit__(kind, error, trace)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            return self._fake(func, args, kwargs)
        if tensors:
            return func(*args, **kwargs)
        return self._made(func, args, kwargs)

    def _fake(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default):
            return _zero(args[0].dtype)
        if func is aten.allclose.default:
            return True
        if func is aten.any.default:
            return torch.zeros((), dtype=torch.bool)
        if func is aten.nonzero.default:
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        if func is aten._grouped_mm.default:
            return self._grouped(*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], _numbered(args[1]))
        elif func in (aten.index_put.default, aten.index_put_.default):
            args = (args[0], _numbered(args[1]), *args[2:])
        return self._without_data(func, args, kwargs)

    def _made(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation makes out of nothing: fake first, real where it is small and steers."""
        fake = self._without_data(func, args, kwargs)
        made = [x for x in tree_iter(fake) if isinstance(x, Tensor)]
        if made and all(_steers(x) for x in made):
            return func(*args, **kwargs)
        return fake

    def _grouped(
        self,
        a: Tensor,
        b: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Products of groups of rows with a matrix each; torch's own shape function takes bfloat16 alone, its CPU
        kernel any type."""
        shape: tuple[int, ...] = (a.shape[-2], b.shape[-1])
        if a.dim() == b.dim():
            assert a.dim() == 3 or offs is not None
            shape = (a.shape[0] if offs is None else offs.numel(), *shape)
        with self._mode:
            return torch.empty(shape, dtype=out_dtype or a.dtype)

    def _without_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            with self._mode:
                return func(*args, **kwargs)
        finally:
            # Its weak references would keep module.to() from exchanging parameters.
            self._mode.fake_tensor_converter.meta_converter.tensor_memo.clear()


def _steers(tensor: Tensor) -> bool:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.numel() <= 1  # a scalar, such as an optimizer's number of steps
    return tensor.numel() <= _STEERING


def _zero(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 0.0 if dtype.is_floating_point else 0


def _numbered(indices: Any) -> list[Any]:
    """Masks among indices as positions: how many they are is known where the mask is real."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += list(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


@contextlib.contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """This process as rank 0 of `size`, whose collectives take no time and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # It knows the groups of a mesh by their names, which the next plan's may not have, or have for others.
        _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
