"""Attention over a prefix tree: each token sees its node up to itself, and all of the node's ancestors.

    node 0: a b c          queries  keys
      node 1: d e          a b c    a b c         own tokens, causal
      node 2: f g          d e      d e           own tokens, causal
                           f g      f g           own tokens, causal
                           d e f g  a b c         what is below a node sees all of it

The nodes stand in preorder, so what is below a node follows it without a gap: one product of queries and keys for each
inner node, all that are equally deep in one call, and no key is copied. The parts of a query are merged by their
log-sum-exps; with the merged output and log-sum-exp each part's own backward pass gives its share of the exact gradient
(the softmax of a part is exp(score - merged log-sum-exp), and rowsum(dO * O) is of the whole).

What computes the parts is a kernel of tree_kernels.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

Segment = tuple[int, int, int, int]
"""Queries [a, b) that see keys [c, d)."""


@dataclass(frozen=True, slots=True)
class Level:
    """Segments whose queries are disjoint, queries and keys increasing: what one call of a kernel computes."""

    causal: bool  # own tokens, which are all tokens; else every query of a segment sees all of its keys
    held: bool  # the keys are those of the held prefix
    queries: slice | Tensor  # which tokens the segments' queries are: i64 where they are not in one piece
    keys: slice | Tensor
    cu_q: Tensor  # i32 (segments + 1,), borders among `queries`
    cu_k: Tensor
    longest_q: int
    longest_k: int

    def to(self, device: torch.device) -> Level:
        """On `device`."""
        queries, keys = (x.to(device) if isinstance(x, Tensor) else x for x in (self.queries, self.keys))
        return replace(self, queries=queries, keys=keys, cu_q=self.cu_q.to(device), cu_k=self.cu_k.to(device))


def level(segments: Sequence[Segment], causal: bool, held: bool = False) -> Level:
    """Of segments (at least one, none empty), in main memory."""
    queries, keys = [(a, b) for a, b, _, _ in segments], [(c, d) for _, _, c, d in segments]
    return Level(
        causal,
        held,
        _tokens(queries),
        _tokens(keys),
        _borders(queries),
        _borders(keys),
        max(b - a for a, b in queries),
        max(d - c for c, d in keys),
    )


def _tokens(ranges: Sequence[tuple[int, int]]) -> slice | Tensor:
    if all(left[1] == right[0] for left, right in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(a, b) for a, b in ranges])


def _borders(ranges: Sequence[tuple[int, int]]) -> Tensor:
    sizes = torch.tensor([0, *(b - a for a, b in ranges)])
    return sizes.cumsum(0).to(torch.int32)


Part = tuple[Level, Tensor, Tensor]
"""What a level's queries see: output (n, H, D) and log-sum-exp (H, n)."""


class Kernel(Protocol):
    """Attention of the segments of a level."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Level, scale: float) -> tuple[Tensor, Tensor, Any]:
        """Of `at`'s queries q (n, H, D) and keys k, v (m, G, D): output (n, H, D), log-sum-exp (H, n), and what the
        backward pass wants to have back."""

    def merge(self, out: Tensor, lse: Tensor, parts: Sequence[Part]) -> Tensor:
        """The output (T, H, D) with more parts in it, in its dtype; lse (H, T) becomes that of all. Writes over out."""

    def backward(self, grad: Tensor, saved: Saved, at: Level, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Of a level: its operands, and the merged output and log-sum-exp of its queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    state: Any


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Sequence[Level],
    scale: float,
    kernel: Kernel,
    held: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of the T tokens of a tree's nodes: q (T, H, D), k and v (T, G, D), G dividing H -> (T, H, D).

    levels: the first is causal and has every token; the others add what is above. held: keys and values (P, G, D) of a
    prefix that stands above all of the tree and was computed before; its gradients are those of this tree's tokens.
    """
    key, value = held if held is not None else (None, None)
    found: Tensor = _TreeAttention.apply(q, k, v, key, value, tuple(levels), scale, kernel)  # type: ignore[no-untyped-call]
    return found


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        held_k: Tensor | None,
        held_v: Tensor | None,
        levels: tuple[Level, ...],
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        own, *above = levels
        out, lse, state = kernel.forward(q, k, v, own, scale)
        states, parts = [state], list[Part]()
        for at in above:
            keys, values = (held_k, held_v) if at.held else (k, v)
            assert keys is not None and values is not None
            more, more_lse, state = kernel.forward(q[at.queries], keys[at.keys], values[at.keys], at, scale)
            states.append(state)
            parts.append((at, more, more_lse))
        if parts:
            out = kernel.merge(out, lse, parts)
        ctx.save_for_backward(q, k, v, held_k, held_v, out, lse)
        ctx.levels, ctx.scale, ctx.kernel, ctx.states = levels, scale, kernel, states
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, held_k, held_v, out, lse = ctx.saved_tensors
        own, *above = ctx.levels
        dq, dk, dv = ctx.kernel.backward(grad, Saved(q, k, v, out, lse, ctx.states[0]), own, ctx.scale)
        held: list[Tensor | None] = [None, None]
        for at, state in zip(above, ctx.states[1:], strict=True):
            keys, values = (held_k, held_v) if at.held else (k, v)
            saved = Saved(
                q[at.queries], keys[at.keys], values[at.keys], out[at.queries], lse[:, at.queries], state
            )
            more_q, more_k, more_v = ctx.kernel.backward(grad[at.queries], saved, at, ctx.scale)
            _add(dq, at.queries, more_q)
            if at.held:
                held = [more_k, more_v]
            else:
                _add(dk, at.keys, more_k)
                _add(dv, at.keys, more_v)
        return dq, dk, dv, *held, None, None, None


def _add(total: Tensor, at: slice | Tensor, part: Tensor) -> None:
    if isinstance(at, slice):
        total[at] += part
    else:
        total.index_add_(0, at, part)
