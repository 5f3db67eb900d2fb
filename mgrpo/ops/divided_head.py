"""The vocabulary head divided among ranks that have the same tokens (policy.mesh.tp and cp): each multiplies its own.

    T tokens on g ranks     rank r:  hidden states of its n tokens -> head -> log-probs, entropies (n,)
                            all:     gathered -> (T,) -> the loss of all tokens, the same on every rank

8 bytes a token travel, so any loss goes, also one that looks at whole trajectories. On each rank the loss has the
gradient of the rank's own tokens: d hidden is whole for these, and d weight is a part of a sum over the ranks.

A rank takes as many products a token as one process does, for n tokens in the place of T (docs/kernels.md, "One phase
and two"): three where a row's coefficient is known from that row alone, else four.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.ops import check, head
from mgrpo.ops.backend import choose
from mgrpo.ops.grpo_loss import LossInputs, known_loss, prepare
from mgrpo.ops.linear_grpo_loss import one_phase
from mgrpo.ops.selective_logprob import row_logprob
from mgrpo.ops.token_loss import needs_two_phases, token_loss

# torch 2.13 has a new name for it.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class TokenShare:
    """Which of T tokens are whose in a group of ranks."""

    group: dist.ProcessGroup
    total: int
    """T."""
    own: Tensor
    """i64 (n,): this rank's, in its order."""
    place: Tensor
    """i64 (T,): where each token is in what is gathered, `most` rows of every rank."""
    most: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, places: Sequence[Tensor], device: torch.device) -> TokenShare:
        """places: of each rank of the group, i64 in main memory, the numbers of its tokens in its order; all of them
        together are 0 .. T - 1, each once."""
        most = max(1, *(len(i) for i in places))
        number = torch.cat([rank * most + torch.arange(len(i)) for rank, i in enumerate(places)])
        place = number[torch.cat(list(places)).argsort()]
        own = places[dist.get_rank(group)]
        return cls(group, len(place), own.to(device), place.to(device), most)

    def gather(self, own: Tensor) -> Tensor:
        """(n, ...) of this rank's tokens -> (T, ...) of all, on every rank. Its gradient must be the same on all ranks;
        each takes that of its own tokens. A collective."""
        out: Tensor = _Gather.apply(own, self)  # type: ignore[no-untyped-call]
        return out


class _Gather(torch.autograd.Function):
    """See TokenShare.gather."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: TokenShare) -> Tensor:
        ctx.share = share
        return gather_parts(own, share.most, share.group).flatten(0, 1).index_select(0, share.place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.share.own), None


def own_rows(every: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of a tensor (T, ...) that is the same on all g ranks of the group: its part of tensor_split(g).
    Its gradient is put together from those of all ranks and is whole on each: a collective."""
    out: Tensor = _OwnRows.apply(every, group)  # type: ignore[no-untyped-call]
    return out


class _OwnRows(torch.autograd.Function):
    """See own_rows."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, group: dist.ProcessGroup) -> Tensor:
        parts = every.tensor_split(dist.get_world_size(group))
        ctx.lengths, ctx.group = [len(part) for part in parts], group
        return parts[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found = gather_parts(grad, max(1, *ctx.lengths), ctx.group)
        return torch.cat([rows[:length] for rows, length in zip(found, ctx.lengths, strict=True)]), None


def gather_parts(own: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
    """(n, ...) -> (g, most, ...) of all ranks of the group, filled up with zeros; n <= most."""
    if len(own) < most:
        own = F.pad(own, (0, 0) * (own.dim() - 1) + (0, most - len(own)))
    size = dist.get_world_size(group)
    out = own.new_empty(size * most, *own.shape[1:])
    _ALL_GATHER(out, own.contiguous(), group=group)
    return out.reshape(size, *own.shape)


def divided_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    share: TokenShare,
    *,
    config: GrpoLossConfig,
    chunk: int | None = None,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`linear_grpo_loss` over the ranks of `share`, all together: its loss and metrics, the same on every rank.

    hidden (n, H): of this rank's tokens, in share's order. weight (V, H), target_ids (T,) and all other arguments are
    those of linear_grpo_loss for all T tokens, packed, the same on every rank; so are the errors. The gradient of
    hidden is whole, that of weight the part of this rank's tokens.
    """
    check.head(hidden, weight)
    check.tensor("hidden", hidden, (len(share.own), None), (hidden.dtype,), hidden)
    ids_shape = torch.Size((share.total,))
    check.ids(target_ids, ids_shape, weight.shape[0], hidden, inputs.get("loss_mask"))
    chunk = head.chunk_rows(chunk, hidden, weight)
    backend = choose("auto", hidden.device, hidden.dtype)
    loss = known_loss(config)
    known = prepare(hidden, target_ids, loss, backend, inputs)
    mine = known.rows(share.own)
    if backend != "reference" and not needs_two_phases(loss, known.old_logprobs is not None):
        # Metrics and value need all tokens, the gradient this rank's alone: it is made with the log-probs.
        part, _, *found = one_phase(hidden, weight, mine, loss, chunk, backend)
        logp, entropy = share.gather(torch.stack(found, 1).detach()).unbind(1)
        value, metrics = token_loss(logp, entropy, known, loss)
        return part + (value - part).detach(), metrics
    if backend == "reference":
        logits = head.plain_logits(hidden, weight)
        own = row_logprob(logits, mine.target_ids, config.temperature)
    else:
        from mgrpo.ops import library_head

        acts = known.active(loss)[share.own]  # a row's trajectory may act by tokens of other ranks
        own = library_head.linear_logprob(
            hidden, weight, mine.target_ids, acts, config.temperature, chunk, backend
        )[:2]
    logp, entropy = share.gather(torch.stack(own, 1)).unbind(1)
    return token_loss(logp, entropy, known, loss)
