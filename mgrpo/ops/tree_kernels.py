"""What computes the parts of attention over a prefix tree (tree_attention.py).

CpuKernel      torch's flash attention for CPUs, segment after segment; float32, float64, bfloat16
VarlenKernel   on a GPU torch's flash attention for segments of varying length; half precision
FlashKernel    the same through the package flash-attn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgrpo.ops.tree_attention import Level, Part, Saved

_aten: Any = torch.ops.aten


class CpuKernel:
    """torch's flash attention for CPUs, a call for each segment."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Level, scale: float) -> tuple[Tensor, Tensor, Any]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.empty(q.shape[1], q.shape[0], dtype=exact)
        for queries, keys in _pieces(at):
            heads = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))
            part, part_lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                *heads, 0.0, at.causal, scale=scale
            )
            out[queries] = part[0].transpose(0, 1)
            lse[:, queries] = part_lse[0]
        return out, lse, None

    def merge(self, out: Tensor, lse: Tensor, parts: Sequence[Part]) -> Tensor:
        """Parts are added in the log-sum-exp's precision."""
        total = out.to(lse.dtype)
        for at, more, more_lse in parts:
            before = lse[:, at.queries]
            both = torch.logaddexp(before, more_lse)
            old, new = (torch.exp(part - both).t().unsqueeze(-1) for part in (before, more_lse))  # (n, H, 1)
            if isinstance(at.queries, slice):
                total[at.queries].mul_(old).addcmul_(more.to(total.dtype), new)
            else:
                total.index_copy_(0, at.queries, total[at.queries] * old + more.to(total.dtype) * new)
            lse[:, at.queries] = both
        return total.to(out.dtype)

    def backward(self, grad: Tensor, saved: Saved, at: Level, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (saved.q, saved.k, saved.v)
        )
        for queries, keys in _pieces(at):
            g, q, o = (x[queries].transpose(0, 1)[None] for x in (grad, saved.q, saved.out))
            k, v = (x[keys].transpose(0, 1)[None] for x in (saved.k, saved.v))
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, saved.lse[None, :, queries], 0.0, at.causal, scale=scale
            )
            for total, tokens, part in zip((dq, dk, dv), (queries, keys, keys), found, strict=True):
                total[tokens] = part[0].transpose(0, 1)
        return dq, dk, dv


def _pieces(at: Level) -> list[tuple[slice, slice]]:
    """Of each segment its place among the level's queries and keys."""
    q, k = at.cu_q.tolist(), at.cu_k.tolist()
    return [(slice(*q[i : i + 2]), slice(*k[i : i + 2])) for i in range(len(q) - 1)]


class GpuKernel:
    """What both have in common."""

    def merge(self, out: Tensor, lse: Tensor, parts: Sequence[Part]) -> Tensor:
        """See kernels/tree_merge.py."""
        from mgrpo.ops.device import tree_merge

        for at, more, more_lse in parts:
            tree_merge(out, lse, more, more_lse, at.queries)
        return out


class VarlenKernel(GpuKernel):
    """torch's flash attention for segments of varying length."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Level, scale: float) -> tuple[Tensor, Tensor, Any]:
        out, lse, *state = _aten._flash_attention_forward(
            q, k, v, at.cu_q, at.cu_k, at.longest_q, at.longest_k, 0.0, at.causal, False, scale=scale
        )
        return out.contiguous(), lse, state[:2]  # it is laid out as q is

    def backward(self, grad: Tensor, saved: Saved, at: Level, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
            grad.contiguous(),
            saved.q,
            saved.k,
            saved.v,
            saved.out,
            saved.lse.contiguous(),
            at.cu_q,
            at.cu_k,
            at.longest_q,
            at.longest_k,
            0.0,
            at.causal,
            *saved.state,
            scale=scale,
        )
        return found


class FlashKernel(GpuKernel):
    """flash-attn's own functions. They have run on no GPU yet."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Level, scale: float) -> tuple[Tensor, Tensor, Any]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, _, state = _flash_attn_varlen_forward(
            q, k, v, at.cu_q, at.cu_k, at.longest_q, at.longest_k, 0.0, scale, at.causal
        )
        return out.contiguous(), lse, state

    def backward(self, grad: Tensor, saved: Saved, at: Level, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (saved.q, saved.k, saved.v)
        )
        _flash_attn_varlen_backward(
            grad.contiguous(), saved.q, saved.k, saved.v, saved.out, saved.lse.contiguous(), dq, dk, dv,
            at.cu_q, at.cu_k, at.longest_q, at.longest_k, 0.0, scale, at.causal,
            -1, -1, 0.0, None, False, saved.state,
        )  # fmt: skip
        return dq, dk, dv
