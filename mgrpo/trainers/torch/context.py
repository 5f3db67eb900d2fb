"""Rows divided among the ranks of a context-parallel group (policy.mesh.cp), for trajectories too long for one.

    a row of 8 tokens, cp = 2      rank 0: 0 1 . . . . 6 7      rank 1: . . 2 3 4 5 . .

A row is padded to 2 * cp pieces of the same length. Rank r computes pieces r and 2 * cp - 1 - r, so that the ranks'
queries meet as many keys. Everything but attention works token by token. For attention the keys and values of a layer
are gathered from all ranks of the group, and their gradients summed into the ranks that they came from; a piece's
queries attend to what stands before them. Beside the activations of its own tokens a rank holds the keys and values of
the layer at hand, which grouped heads keep small.

Each rank multiplies the hidden states of its own sampled tokens by the vocabulary head (ops/divided_head.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from mgrpo.errors import ConfigError
from mgrpo.model import attention
from mgrpo.ops.divided_head import gather_parts

ATTENTION = "mgrpo_context"
SPLIT = "mgrpo_split"  # the name under which a layer's attention gets its Context
# torch 2.13 has a new name for it.
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class Context:
    """This rank's place among those that divide rows with it."""

    group: Any
    """Of torch.distributed."""
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Context:
        """mesh: with one dimension, the ranks of the group."""
        return cls(mesh.get_group(), mesh.size(), mesh.get_local_rank())

    def pieces(self, rank: int) -> tuple[int, int]:
        """Numbers of the pieces of a row that `rank` computes."""
        return rank, 2 * self.size - 1 - rank

    def columns(self, rank: int, piece: int) -> Tensor:
        """i64 (2 * piece,): the tokens of a row that `rank` computes, in its order."""
        return torch.cat([torch.arange(p * piece, (p + 1) * piece) for p in self.pieces(rank)])

    def piece(self, width: int) -> int:
        """Tokens of one piece of rows of `width` tokens."""
        return -(-width // (2 * self.size))

    def own_columns(self, width: int) -> Tensor:
        """i64 (2 * piece,): the columns that this rank computes of rows of `width` tokens, in its order; the last ones
        may be padding behind them."""
        return self.columns(self.rank, self.piece(width))

    def use(self, model: Any) -> None:
        """Have `model` (a transformers model) compute divided rows, and whole ones as before."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import flash_attention_mask

        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, flash_attention_mask)  # none for rows without padding
        model.set_attn_implementation(ATTENTION)

    @torch.no_grad()
    def check(self, states: Callable[..., Tensor], device: torch.device, name: str) -> None:
        """Raises ConfigError where divided rows are not computed as whole ones: the model mixes tokens elsewhere than
        in an attention that transformers lets us replace. states: backbone arguments -> (R, S, H). A collective."""
        rows = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 0, 0, 0, 1]])
        reason = "other hidden states"
        try:
            every = torch.ones_like(rows, dtype=torch.bool)
            own = self.hidden(states, rows, every, device)
            whole = states(input_ids=rows.to(device)).flatten(0, 1)
            whole = whole.index_select(0, self.places(every)[self.rank].to(device))
            if torch.allclose(own, whole, rtol=1e-3, atol=1e-3):
                return
        except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = str(error)
        raise ConfigError(
            f"{name}: policy.mesh.cp={self.size} divides rows among ranks, which this model does not compute as whole "
            f"ones ({reason}); use policy.mesh.dp"
        )

    def places(self, scored: Tensor) -> list[Tensor]:
        """Of each rank i64 (n,), in main memory: which of the tokens where scored (R, S) is set, numbered row-major,
        are its own, in the order of hidden()."""
        piece, scored = self._padded(scored)
        number = (scored.flatten().cumsum(0) - 1).view_as(scored)
        columns = [self.columns(rank, piece) for rank in range(self.size)]
        return [number[:, c][scored[:, c]] for c in columns]

    def hidden(
        self, states: Callable[..., Tensor], ids: Tensor, scored: Tensor, device: torch.device
    ) -> Tensor:
        """Hidden states (n, H) of this rank's tokens where scored (R, S) is set, which are places(scored)[rank]. ids:
        (R, S), the same on all ranks. A collective."""
        (piece, ids), (_, scored) = self._padded(ids), self._padded(scored)
        own = self.columns(self.rank, piece)
        found = states(
            input_ids=ids[:, own].to(device),
            position_ids=own.expand(len(ids), -1).to(device),
            **{SPLIT: self},
        )
        at = scored[:, own].flatten().nonzero().squeeze(1)
        return found.flatten(0, 1).index_select(0, at.to(device))

    def _padded(self, rows: Tensor) -> tuple[int, Tensor]:
        """(tokens of a piece, rows (R, S) in main memory, filled up to 2 * size pieces)."""
        piece = self.piece(rows.shape[1])
        return piece, F.pad(rows.cpu(), (0, 2 * self.size * piece - rows.shape[1]))


class _Gather(torch.autograd.Function):
    """own (n, ...) -> (size, n, ...) of all ranks. The gradient of it is another on each rank; their sum is taken."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, context: Context) -> Tensor:
        ctx.context = context
        return gather_parts(own, len(own), context.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = grad.float().flatten(0, 1).contiguous()
        out = parts.new_empty(grad.shape[1:])
        _REDUCE_SCATTER(out, parts, group=ctx.context.group)
        return out.to(grad.dtype), None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """AttentionInterface function: query (R, H, n, D), key and value (R, G, n, D) of this rank's tokens -> (R, n, H,
    D)."""
    context: Context | None = kwargs.pop(SPLIT, None)
    if context is None:
        return attention.unpacked(module, query, key, value, attention_mask, **kwargs)
    attention.refuse_what_is_not_computed(module, kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)
    keys, values = in_order(key, context), in_order(value, context)
    piece = query.shape[2] // 2
    parts = [
        _after(
            query[:, :, i * piece : (i + 1) * piece],
            keys,
            values,
            number * piece,
            kwargs.get("scaling"),
            kwargs.get("sliding_window"),
        )
        for i, number in enumerate(context.pieces(context.rank))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def in_order(own: Tensor, context: Context) -> Tensor:
    """This rank's (R, G, n, D) -> (R, G, cp * n, D) of the whole rows."""
    gathered: Tensor = _Gather.apply(own, context)  # type: ignore[no-untyped-call]
    first, second = gathered.chunk(2, dim=3)
    pieces = [*first, *reversed(second.unbind(0))]
    return torch.cat(pieces, dim=2)


def _after(
    query: Tensor, key: Tensor, value: Tensor, begin: int, scale: float | None, window: int | None
) -> Tensor:
    """Attention of the queries (R, H, p, D) that stand at `begin` of rows whose keys are (R, G, S, D)."""
    count = query.shape[2]
    start = 0 if window is None else max(0, begin - window + 1)
    key, value = key[:, :, start : begin + count], value[:, :, start : begin + count]
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cuda" and start == 0 and (window is None or begin + count <= window):
        # Its kernels know a triangle that ends at the last key and need no mask in memory.
        mask: Any = causal_lower_right(count, begin + count)
    else:
        at = torch.arange(count, device=query.device)[:, None] + begin
        ahead = at - torch.arange(start, begin + count, device=query.device)
        mask = (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
