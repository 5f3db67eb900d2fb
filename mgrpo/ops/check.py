"""Input checks of the loss ops. Shapes, dtypes and devices are checked always; values (ranges, monotony, finiteness)
where looking at them needs no device synchronisation: on the CPU, outside a compiled graph. On a GPU the kernels treat
a row with a bad id or a non-finite log-prob as idle and count it in the metric `nonfinite_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MASTER_BESIDE = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))
_MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)


def values_visible(x: Tensor) -> bool:
    """True where a look at x's values costs no synchronisation and breaks no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def tensor(
    name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    """TypeError or ValueError naming `name` unless x has this shape (None: any size), dtype and like's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {x.dtype} is not one of {', '.join(map(str, dtypes))}")
    if x.dim() != len(shape) or any(s is not None and s != n for s, n in zip(shape, x.shape, strict=True)):
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: shape {tuple(x.shape)} where ({want}) is needed")
    if x.device != like.device:
        raise ValueError(f"{name}: on {x.device}, expected {like.device}")


def floating(name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """`tensor` for any floating dtype."""
    tensor(name, x, shape, _FLOATS, like)


def finite(name: str, x: Tensor, where: Tensor | None = None) -> None:
    """ValueError naming the first entry of x that is not finite (among those where `where` is true)."""
    if values_visible(x):
        bad = ~x.isfinite() if where is None else ~x.isfinite() & where
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"{name}: {x[at].item()} at {list(at)} is not finite")


def rewards(x: Tensor) -> None:
    """ValueError naming the first reward that is not finite, or is beyond half of its dtype's range: the difference of
    two may then be beyond all of it."""
    finite("rewards", x)
    largest = torch.finfo(x.dtype).max / 2
    if values_visible(x):
        far = x.abs() > largest
        if bool(far.any()):
            at = int(far.nonzero()[0])
            raise ValueError(
                f"rewards: {x[at].item()} at [{at}] is beyond {largest:.4g}, half of {x.dtype}'s range"
            )


def head(hidden: Tensor, weight: Tensor) -> None:
    """hidden (T, H) and weight (V, H) on one device, of one floating dtype or weight float32 beside half precision."""
    floating("hidden", hidden, (None, None), hidden)
    floating("weight", weight, (None, hidden.shape[1]), hidden)
    if weight.dtype != hidden.dtype and (weight.dtype, hidden.dtype) not in _MASTER_BESIDE:
        raise TypeError(f"weight: dtype {weight.dtype} differs from hidden's, {hidden.dtype}")


def ids(target_ids: Tensor, rows: int, vocabulary: int | None, like: Tensor) -> None:
    """target_ids int64 (T,) within [0, vocabulary); None: the range is known only to other ranks."""
    tensor("target_ids", target_ids, (rows,), (torch.int64,), like)
    if vocabulary == 0 and rows:
        raise ValueError(f"target_ids: {rows} of them, and the vocabulary is empty")
    if vocabulary is not None and rows and values_visible(target_ids):
        low, high = (int(v) for v in target_ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"target_ids: {low if low < 0 else high} is outside [0, {vocabulary})")


def cu_seqlens(x: Tensor, rows: int, like: Tensor) -> None:
    """int32 (N+1,), from 0 to T, never decreasing."""
    tensor("cu_seqlens", x, (None,), (torch.int32,), like)
    if x.numel() < 1:
        raise ValueError("cu_seqlens: empty; it holds N+1 offsets")
    if values_visible(x):
        first, last = int(x[0]), int(x[-1])
        if first != 0 or last != rows:
            raise ValueError(f"cu_seqlens: runs from {first} to {last}; it must run from 0 to {rows}")
        steps = x.diff()
        if bool((steps < 0).any()):
            at = int((steps < 0).nonzero()[0])
            raise ValueError(f"cu_seqlens: falls from {int(x[at])} to {int(x[at + 1])} at {at + 1}")


def mask(loss_mask: Tensor | None, rows: int, like: Tensor) -> None:
    """(T,) of any mask dtype, or None."""
    if loss_mask is not None:
        tensor("loss_mask", loss_mask, (rows,), _MASKS, like)


def weights(name: str, x: Tensor | None, count: int, like: Tensor) -> None:
    """Weights (N,), finite and not negative, or None."""
    if x is None:
        return
    floating(name, x, (count,), like)
    finite(name, x)
    if values_visible(x) and bool((x < 0).any()):
        raise ValueError(f"{name}: {x.min().item()} is below 0")
