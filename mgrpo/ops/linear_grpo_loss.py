"""The GRPO family's loss from hidden states: the vocabulary head and the loss in one op, so that logits never
exist whole. The formula is that of grpo_loss.py with logits = hidden weight^T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.losses.base import PolicyLoss
from mgrpo.ops import check, head
from mgrpo.ops.backend import choose, fast
from mgrpo.ops.encoding import encode
from mgrpo.ops.grpo_loss import LossInputs, known_loss, prepare
from mgrpo.ops.selective_logprob import row_logprob, rows_logprob
from mgrpo.ops.token_loss import Tokens, name_metrics, needs_two_phases, token_loss
from mgrpo.ops.token_values import TokenValues, token_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    chunk: int | None = None,
    tp_group: ProcessGroup | None = None,
    impl: str = "auto",
    tokens: Literal[False] = False,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    chunk: int | None = None,
    tp_group: ProcessGroup | None = None,
    impl: str = "auto",
    tokens: Literal[True],
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor], TokenValues]: ...


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    chunk: int | None = None,
    tp_group: ProcessGroup | None = None,
    impl: str = "auto",
    tokens: bool = False,
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], TokenValues]:
    """`grpo_loss` of logits = hidden weight^T, differentiable in hidden and weight (V, H).

    Packed: hidden (T, H), target_ids (T,) and cu_seqlens. Padded: hidden (B, S, H), target_ids (B, S), no cu_seqlens;
    rows where the mask is 0 are not read, however hidden lies in memory (impl "reference" computes them all).

    hidden and weight are of one floating dtype, or of two of which hidden's holds the values of the weight's (which is
    then converted), or hidden is bfloat16 or float16 and weight float32 (it is then rounded to hidden's dtype for the
    products). Each has its gradient in its own dtype. Logits are float32 for half-precision operands (but for impl
    "reference", which is torch's own head); torch.autocast changes nothing.

    chunk: rows of logits that exist at one time; None: on a GPU as many as take 4 GiB, 4096 at most, on the CPU as many
    as take 32 MiB (128 at least, 2048 at most). tp_group: the ranks that hold the vocabulary in equal
    shards, in rank order; `weight` is then this rank's shard and everything else is the same on every rank.
    Every other argument, the result and the errors are grpo_loss's.
    """
    check.head(hidden, weight)
    vocabulary = weight.shape[0] if tp_group is None else None
    check.ids(target_ids, hidden.shape[:-1], vocabulary, hidden, inputs.get("loss_mask"))
    chunk = head.chunk_rows(chunk, hidden, weight)
    backend = choose(impl, hidden.device, hidden.dtype)
    loss = known_loss(config)
    known = prepare(hidden, target_ids, loss, backend, inputs)
    if tp_group is not None:
        from mgrpo.ops import tensor_parallel

        group, backend = tp_group, fast(backend)
        value, metrics, logp, entropy = tensor_parallel.loss(
            hidden, weight, known, loss, chunk, backend, group
        )
    elif backend == "reference":
        states = hidden.flatten(0, -2)
        if inputs.get("loss_mask") is not None:  # what stands in a masked row, NaN too, reaches no product
            states = torch.where(known.mask[:, None], states, 0.0)
        logp, entropy = row_logprob(head.plain_logits(states, weight), known.target_ids, config.temperature)
        value, metrics = token_loss(logp, entropy, known, loss)
    else:
        value, metrics, logp, entropy = _fast(hidden, weight, known, loss, chunk, backend)
    if not tokens:
        return value, metrics
    if backend != "reference":
        rest = known.mask & ~known.active(loss)  # in a call of their own: the loss keeps its bits
        more = rows_logprob(
            hidden, weight, known.target_ids, rest, config.temperature, chunk, backend, tp_group
        )
        logp, entropy = (torch.where(rest, a, b) for a, b in zip(more, (logp, entropy), strict=True))
    values, mean = token_values(logp, entropy, known, loss, target_ids.shape)
    return value, metrics | mean, values


def _fast(
    hidden: Tensor, weight: Tensor, known: Tokens, loss: PolicyLoss, chunk: int, backend: str
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """(loss, metrics, logp, entropy); the last two of active rows."""
    from mgrpo.ops import library_head

    if needs_two_phases(loss, known.old_logprobs is not None):
        active = known.active(loss)
        logp, entropy, *_ = library_head.linear_logprob(
            hidden, weight, known.target_ids, active, loss.config.temperature, chunk, backend
        )
        return *token_loss(logp, entropy, known, loss), logp, entropy
    return one_phase(hidden, weight, known, loss, chunk, backend)


def one_phase(
    hidden: Tensor, weight: Tensor, known: Tokens, loss: PolicyLoss, chunk: int, backend: str
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """(loss, metrics, logp, entropy), the last two of active rows, of a loss that does not need two phases: the
    gradient is made in the forward pass. backend: a fast one."""
    from mgrpo.ops import library, library_head

    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    value, metrics, logp, entropy, _, _ = library_head.linear_grpo_loss(
        hidden, weight, *library.flatten(known), encode(loss.config), chunk, needs, backend
    )
    return value, name_metrics(metrics), logp, entropy
