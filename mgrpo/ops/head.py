"""The vocabulary head without [T, V]: chunks of rows, three products, nothing for rows that cannot move a
gradient.

    for each chunk of active rows:   z = h W^T          (1)  float32
                                   g = d loss / d z     (loss_rows), in the place of z or as the operands are
                                   dh = g W            (2)
                                   dW += g^T h         (3), accumulated in float32

float32 operands: everything is float32, and g takes the place of z. Half-precision operands (h and W; a float32 W is
rounded to them): products of two of their entries are exact in float32, so z has no rounding but that of its sum; g is
rounded to the operands' dtype, since it is one of (2) and (3). On a GPU the tensor cores do it so; on a CPU the same
numbers come from products in float32, a block of columns at a time.

Dead rows (masked, of weight 0, or of advantage 0 with no other term) never reach (1); rows whose gradient turned
out to be 0, because the clip holds them or their logits are not finite, leave before (2) and (3) where the
count is known without a device synchronisation (on the CPU). What is known of the active rows beside their hidden
states is put in their order once, behind the first product, so that a GPU has work meanwhile; where all rows act, a GPU
reads and writes them where they are. Where a row's coefficient depends on other rows,
`logprob` runs (1) for every active row and `logprob_backward` all three for the rows that move.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from mgrpo.losses.base import PolicyLoss
from mgrpo.ops.backend import rows
from mgrpo.ops.token_loss import Tokens

_COMPACT_BELOW = 7 / 8  # moving the rows of a chunk together pays when at least this part of it falls away
CHUNK = 4096
"""Rows of logits at one time on a GPU, at most: every chunk reads and writes d weight in float32, which takes 7 %
longer with half as many rows (docs/kernels.md)."""
_CHUNK_BYTES = 4 << 30  # of what is alive of a chunk on a GPU: bounds the rows of vocabularies above 175,000
_CPU_CHUNK_BYTES = 32 << 20  # of logits at one time on a CPU,
_CPU_CHUNK_FLOOR = 128  # but at least these rows: products of fewer are markedly slower
_CPU_CHUNK_CEILING = 2048  # and at most these
COLUMNS = 8192
"""Columns of half-precision operands that are converted to float32 at a time on a CPU."""
HALF = (torch.bfloat16, torch.float16)
F = TypeVar("F", bound=Callable[..., Any])


def chunk_rows(chunk: int | None, hidden: Tensor, weight: Tensor) -> int:
    """`chunk`, or where it is None what suits the device, the operands' dtype (hidden's) and the vocabulary of weight
    (V, H); ValueError below 1."""
    if chunk is not None:
        if not chunk > 0:
            raise ValueError(f"chunk: {chunk} is not above 0")
        return chunk
    logit = max(hidden.element_size(), 4)  # half-precision operands have float32 logits,
    if weight.device.type != "cpu":
        logit += hidden.element_size() if hidden.dtype in HALF else 0  # and a gradient beside them
        fit = _CHUNK_BYTES // max(weight.shape[0] * logit, 1)
        return min(max(fit // 128 * 128, 128), CHUNK)
    fit = _CPU_CHUNK_BYTES // max(weight.shape[0] * logit, 1)
    return min(max(fit // 32 * 32, _CPU_CHUNK_FLOOR), _CPU_CHUNK_CEILING)


def _without_autocast(function: F) -> F:
    """Autocast would round operands behind the back of what is written here."""

    @functools.wraps(function)
    def run(hidden: Tensor, *args: Any) -> Any:
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            return function(hidden, *args)
        with torch.autocast(device, enabled=False):
            return function(hidden, *args)

    return cast("F", run)


def plain_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """The reference's, (T, V) of hidden (T, H) or (B, S, H): one product of torch's own in hidden's dtype,
    differentiable."""
    logits: Tensor = _PlainLogits.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight.to(hidden.dtype)
    )
    return logits


class _PlainLogits(torch.autograd.Function):
    """hidden weight^T with the gradients of torch's own product, which autocast rounds neither here nor there."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor) -> Tensor:
        return _product(hidden, weight.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad
        return (
            _product(grad, weight) if need_hidden else None,
            _product(grad.t(), hidden) if need_weight else None,
        )


@_without_autocast
def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


class Needs(NamedTuple):
    """Which gradients the caller wants."""

    hidden: bool
    weight: bool


class Shard(Protocol):
    """How the vocabulary lies: whole here, or split over ranks (tensor_parallel.py)."""

    backend: str

    def loss_rows(
        self, logits: Tensor, tokens: Tokens, loss: PolicyLoss, grad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp, entropy, has_grad) of a chunk, and its gradient in `grad`, which may be `logits`."""

    def logprob(
        self, logits: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logp, entropy, maximum, sum) of a chunk."""

    def local_ids(self, target_ids: Tensor) -> Tensor:
        """Target ids as this shard numbers them."""

    def reduce(self, grad_hidden: Tensor) -> None:
        """Complete d loss / d hidden in place from the shards' parts."""


class Local:
    """The whole vocabulary on this device."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def loss_rows(
        self, logits: Tensor, tokens: Tokens, loss: PolicyLoss, grad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rows(self.backend).loss_rows(logits, tokens, loss, grad)[:3]

    def logprob(
        self, logits: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        partials = rows(self.backend).row_partials(logits, target_ids, None, temperature)
        return finish(*partials, temperature)

    def local_ids(self, target_ids: Tensor) -> Tensor:
        return target_ids

    def reduce(self, grad_hidden: Tensor) -> None:
        pass


def finish(
    maximum: Tensor, total: Tensor, weighted: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, maximum, sum) float32 from the statistics of whole rows; NaN where a row is not finite."""
    log_sum = total.double().log()
    logp = (target.double() - maximum.double()) / temperature - log_sum
    entropy = log_sum - weighted.double() / total.double()
    good = logp.isfinite() & entropy.isfinite()
    nan = float("nan")
    return torch.where(good, logp, nan).float(), torch.where(good, entropy, nan).float(), maximum, total


@_without_autocast
def loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tokens,
    loss: PolicyLoss,
    chunk: int,
    needs: Needs,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, METRICS as a vector, logp, entropy, d hidden, d weight) where a row's coefficient is known row by row:
    gradient in forward. hidden (T, H) or (B, S, H); logp and entropy float32 (T,), 0 in rows that are not active."""
    weight = weight.to(hidden.dtype)
    acting = _active_rows(hidden, tokens.active(loss))
    products = _Products(hidden, weight, needs, shard.backend, acting.every)
    ordered, found = None, []
    for at, h, z in _chunks(hidden, weight, acting, chunk):
        if ordered is None:
            ordered = tokens if acting.every else tokens.rows(acting.index)
        grad = products.room(z)
        *values, has_grad = shard.loss_rows(z, ordered.rows(at), loss, grad)
        found.append(values)
        if grad is not None:
            products.add(grad, h, acting.place(at), has_grad)
    if needs.hidden:
        shard.reduce(products.hidden)
    logp, entropy = (acting.whole(list(x), 0.0) for x in zip(*found, strict=True))
    return *rows(shard.backend).token_loss(logp, entropy, tokens, loss), logp, entropy, *products.done()


@_without_autocast
def logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    active: Tensor,
    temperature: float,
    chunk: int,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, maximum, sum), float32 (T,); 0, 0, 0, 1 where `active` is False."""
    acting = _active_rows(hidden, active)
    ordered, found = None, []
    for at, _, z in _chunks(hidden, weight.to(hidden.dtype), acting, chunk):
        if ordered is None:
            ordered = target_ids[acting.place(slice(None))]
        found.append(shard.logprob(z, ordered[at], temperature))
    logp, entropy, maximum, total = (list(x) for x in zip(*found, strict=True))
    return (
        acting.whole(logp, 0.0),
        acting.whole(entropy, 0.0),
        acting.whole(maximum, 0.0),
        acting.whole(total, 1.0),
    )


@_without_autocast
def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    chunk: int,
    needs: Needs,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """(d hidden, d weight) of sum c logp + e entropy; coefficients: maximum, sum, entropy, c, e, each (T,)."""
    weight = weight.to(hidden.dtype)
    *_, c, e = coefficients
    acting = _active_rows(hidden, (c != 0) | (e != 0))
    products = _Products(hidden, weight, needs, shard.backend, acting.every)
    ordered = None
    for at, h, z in _chunks(hidden, weight, acting, chunk):
        if ordered is None:
            place = acting.place(slice(None))
            ordered = [x[place] for x in (shard.local_ids(target_ids), *coefficients)]
        ids, m, s, entropy, cc, ee = (x[at] for x in ordered)
        grad = products.room(z)
        if grad is not None:
            rows(shard.backend).row_gradients(z, ids, (m, s, entropy, cc, ee), temperature, grad)
            products.add(grad, h, acting.place(at), None)
    if needs.hidden:
        shard.reduce(products.hidden)
    return products.done()


def empty_like_needed(hidden: Tensor, weight: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
    """Uninitialised (d hidden, d weight); empty where not needed. d weight is float32 whatever the weight is."""
    dh = (
        torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if needs.hidden
        else hidden.new_empty(0)
    )
    dw = weight.new_empty(weight.shape if needs.weight else 0, dtype=torch.float32)
    return dh, dw


@dataclass(frozen=True, slots=True)
class _ActiveRows:
    """The rows that are computed, in their order."""

    index: Tensor  # int64 (n,), their places among all
    total: int  # T, of all
    every: bool
    """They are all rows, and are read and written where they are: on a GPU, where hidden states are a block of memory.
    On a CPU products of copies and of rows in place may round in another way."""

    def place(self, at: slice) -> Tensor | slice:
        """Where the active rows `at` are among all."""
        return at if self.every else self.index[at]

    def whole(self, parts: list[Tensor], absent: float) -> Tensor:
        """(T,) of the chunks' values, `absent` in rows that are not active."""
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.every:
            return found
        return found.new_full((self.total,), absent).index_put_((self.index,), found)


def _active_rows(hidden: Tensor, active: Tensor) -> _ActiveRows:
    """Rows of hidden (T, H) or (B, S, H) where `active` (T,) is True."""
    index, total = active.nonzero().squeeze(1), active.shape[0]
    in_place = hidden.device.type != "cpu" and hidden.is_contiguous()
    return _ActiveRows(index, total, in_place and index.numel() == total)


def _chunks(
    hidden: Tensor, weight: Tensor, acting: _ActiveRows, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(which of the active rows, their hidden states, their logits), chunk after chunk: they alone are read of hidden
    (T, H) or (B, S, H); the logits' buffer is the same every time. weight has hidden's dtype."""
    count = acting.index.numel()
    wide = torch.float32 if hidden.dtype in HALF else hidden.dtype
    buffer = hidden.new_empty(min(chunk, count), weight.shape[0], dtype=wide)
    for start in range(0, max(count, 1), chunk):
        at = slice(start, min(start + chunk, count))
        h = _rows(hidden, acting.place(at))
        z = buffer[: at.stop - start]
        if wide == h.dtype:
            torch.mm(h, weight.t(), out=z)
        elif h.device.type == "cpu":
            h32 = h.float()
            for v in range(0, z.shape[1], COLUMNS):
                torch.mm(h32, weight[v : v + COLUMNS].float().t(), out=z[:, v : v + COLUMNS])
        else:
            torch.mm(h, weight.t(), out_dtype=torch.float32, out=z)
        yield at, h, z


def _rows(hidden: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows (n, H) of hidden (T, H), or of (B, S, H) by their number in B x S, however hidden lies in memory."""
    if hidden.dim() == 2:
        return hidden[rows]
    if isinstance(rows, slice):
        return hidden.flatten(0, -2)[rows]
    length = max(hidden.shape[1], 1)
    return hidden[rows // length, rows % length]


class _Products:
    """Products (2) and (3), chunk after chunk in a fixed order."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Needs, backend: str, every: bool) -> None:
        """weight: in hidden's dtype. every: all rows will come, by slices."""
        self.needs = needs
        self.head = weight
        self.hidden, self.weight = empty_like_needed(hidden, weight, needs)
        if not every:
            self.hidden.zero_()
        self._rows = self.hidden.flatten(0, -2) if needs.hidden else self.hidden  # a view
        self.untouched = True  # a first product that overwrites saves writing and reading zeros
        self._in_place = hidden.dtype not in HALF or backend == "cpu"  # whose rows are of one dtype
        self._room = hidden.new_empty(0)
        self._zero = hidden.new_zeros(())

    def room(self, z: Tensor) -> Tensor | None:
        """Where the gradient of the logits z of a chunk is written: over them, or beside them in the operands' dtype
        (over float32 logits other threads would not have read theirs yet); None where it is not needed."""
        if not (self.needs.hidden or self.needs.weight):
            return None
        if self._in_place:
            return z
        if not self._room.numel():  # the first chunk is the largest
            self._room = torch.empty_like(z, dtype=self.head.dtype)
        return self._room[: z.shape[0]]

    def done(self) -> tuple[Tensor, Tensor]:
        """(d hidden, d weight)."""
        if self.untouched:
            self.weight.zero_()
        return self.hidden, self.weight

    def add(self, z: Tensor, h: Tensor, piece: Tensor | slice, has_grad: Tensor | None) -> None:
        """z (n, V): the gradient of rows `piece`, whose hidden states are h; has_grad None: all of them."""
        if has_grad is not None and (isinstance(piece, slice) or z.device.type != "cpu"):
            # A row that is not finite must go: 0 x NaN would spoil the products. How many there are is not known here
            # without waiting for the device.
            h = torch.where(has_grad[:, None], h, self._zero)
        elif has_grad is not None:
            assert not isinstance(piece, slice)
            z, h, piece = _drop(z, h, piece, has_grad)
        if h.dtype in HALF and h.device.type == "cpu":
            self._add_in_float32(z, h, piece)
            return
        if self.needs.hidden:
            if isinstance(piece, slice):
                torch.mm(z, self.head, out=self._rows[piece])
            else:
                self._rows[piece] = torch.mm(z, self.head)
        if self.needs.weight:
            self._add_weight(z, h)
            self.untouched = False

    def _add_weight(self, z: Tensor, h: Tensor) -> None:
        if z.dtype not in HALF:
            if self.untouched:
                torch.mm(z.t(), h, out=self.weight)
            else:
                self.weight.addmm_(z.t(), h)
        elif self.untouched:
            torch.mm(z.t(), h, out_dtype=torch.float32, out=self.weight)
        else:
            torch.addmm(self.weight, z.t(), h, out_dtype=torch.float32, out=self.weight)

    def _add_in_float32(self, z: Tensor, h: Tensor, piece: Tensor | slice) -> None:
        """What tensor cores do with half-precision operands: z, rounded as they are, times them in float32."""
        if self.untouched:
            self.weight.zero_()
            self.untouched = False
        h32 = h.float()
        dh = torch.zeros_like(h32)
        for v in range(0, z.shape[1], COLUMNS):
            part = z[:, v : v + COLUMNS].to(h.dtype).float()
            if self.needs.hidden:
                dh.addmm_(part, self.head[v : v + COLUMNS].float())
            if self.needs.weight:
                self.weight[v : v + COLUMNS].addmm_(part.t(), h32)
        if self.needs.hidden:
            self._rows[piece] = dh.to(h.dtype)


def _drop(z: Tensor, h: Tensor, piece: Tensor, has_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave rows out whose gradient is 0, on the CPU."""
    count = int(has_grad.sum())
    if count > _COMPACT_BELOW * z.shape[0]:
        return z, torch.where(has_grad[:, None], h, 0.0), piece
    keep = has_grad.nonzero().squeeze(1)
    for to, source in enumerate(keep.tolist()):  # forward and in place: to <= source
        if to != source:
            z[to] = z[source]
    return z[:count], h[keep], piece[keep]
