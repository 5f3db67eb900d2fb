"""Input checks of the loss ops. Shapes, dtypes and devices are checked always; values (ranges, monotony, finiteness)
where looking at them needs no device synchronisation: on the CPU, outside a compiled graph. On a GPU the kernels treat
a row with a bad id or a non-finite log-prob as idle and count it in the metric `nonfinite_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)
_MASKS = (torch.bool, torch.uint8, torch.int32, torch.int64, *_FLOATS)
OFFSETS = (torch.int32, torch.int64)
"""Of cu_seqlens and of group ids."""
IGNORED = -100
"""The target id by which other trainers mark a token that is no target: it may stand where the mask is 0."""


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


def number(name: str, x: Tensor, like: Tensor) -> None:
    """A 0-d tensor, floating or int."""
    tensor(name, x, (), (*_FLOATS, *OFFSETS), like)


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
    """hidden (T, H) or (B, S, H) and weight (V, H) on one device, of floating dtypes of which hidden's holds the values
    of the weight's, or half precision beside a float32 weight."""
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        floating("hidden", hidden, (None, None, None), hidden)
    else:
        floating("hidden", hidden, (None, None), hidden)
    floating("weight", weight, (None, hidden.shape[-1]), hidden)
    exact = torch.promote_types(weight.dtype, hidden.dtype) == hidden.dtype
    if not exact and not (weight.dtype == torch.float32 and hidden.dtype in _HALF):
        raise TypeError(
            f"weight: dtype {weight.dtype} beside hidden's, {hidden.dtype}, which does not hold its values; only a "
            "float32 weight is rounded, to bfloat16 or float16"
        )


def ids(
    target_ids: Tensor,
    shape: torch.Size,
    vocabulary: int | None,
    like: Tensor,
    loss_mask: Tensor | None = None,
) -> None:
    """target_ids int64 of this shape, (T,) or (B, S), within [0, vocabulary) (None: the range is known only to other
    ranks), or IGNORED where loss_mask, which is checked too, is 0."""
    tensor("target_ids", target_ids, tuple(shape), (torch.int64,), like)
    mask(loss_mask, tuple(shape), like)
    rows = target_ids.numel()
    if vocabulary == 0 and rows:
        raise ValueError(f"target_ids: {rows} of them, and the vocabulary is empty")
    if vocabulary is None or not rows or not values_visible(target_ids):
        return
    low, high = (int(v) for v in target_ids.aminmax())
    if low >= 0 and high < vocabulary:
        return
    wrong = (target_ids < 0) | (target_ids >= vocabulary)
    if loss_mask is not None:
        wrong &= (target_ids != IGNORED) | (loss_mask != 0)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        value = int(target_ids[at])
        why = f"is outside [0, {vocabulary})"
        if value == IGNORED:
            why += " and stands where the loss_mask is not 0"
        raise ValueError(f"target_ids: {value} at {list(at)} {why}")


def cu_seqlens(x: Tensor, rows: int, like: Tensor) -> None:
    """int32 or int64 (N+1,), from 0 to T, never decreasing."""
    tensor("cu_seqlens", x, (None,), OFFSETS, like)
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


def mask(loss_mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Of this shape, (T,) or (B, S), of any mask dtype, finite and not negative; or None."""
    if loss_mask is None:
        return
    tensor("loss_mask", loss_mask, shape, _MASKS, like)
    if loss_mask.dtype not in (torch.bool, torch.uint8):
        _weights("loss_mask", loss_mask)


def weights(name: str, x: Tensor | None, count: int, like: Tensor) -> None:
    """Weights (N,), finite and not negative, or None."""
    if x is not None:
        floating(name, x, (count,), like)
        _weights(name, x)


def token_weight(x: Tensor | None, mask: Tensor, like: Tensor) -> None:
    """A factor for each token (T,), finite and not negative where the mask (bool, (T,)) is set; or None."""
    if x is not None:
        floating("token_weight", x, tuple(mask.shape), like)
        _weights("token_weight", x, mask)


def _weights(name: str, x: Tensor, where: Tensor | None = None) -> None:
    finite(name, x, where)
    if values_visible(x):
        below = x < 0 if where is None else (x < 0) & where
        if bool(below.any()):
            at = tuple(below.nonzero()[0].tolist())
            raise ValueError(f"{name}: {x[at].item()} at {list(at)} is below 0")
