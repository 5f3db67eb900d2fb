"""The GRPO family's loss from hidden states: the vocabulary head and the loss in one op, so that logits never
exist whole. The formula is that of grpo_loss.py with logits = hidden weight^T.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.ops import check, head
from mgrpo.ops.backend import choose, fast
from mgrpo.ops.encoding import encode
from mgrpo.ops.grpo_loss import LossInputs, known_loss, prepare
from mgrpo.ops.selective_logprob import row_logprob
from mgrpo.ops.token_loss import needs_two_phases, token_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    config: GrpoLossConfig,
    chunk: int | None = None,
    tp_group: ProcessGroup | None = None,
    impl: str = "auto",
    **inputs: Unpack[LossInputs],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss` of logits = hidden weight^T, differentiable in hidden (T, H) and weight (V, H).

    hidden and weight are of one floating dtype, or hidden is bfloat16 or float16 and weight float32: it is then rounded
    to hidden's dtype for the products, and its gradient is float32. Logits are float32 for half-precision operands
    (but for impl "reference", which is torch's own head); torch.autocast changes nothing.

    chunk: rows of logits that exist at one time; None: on a GPU as many as take 4 GiB, 4096 at most, on the CPU as many
    as take 32 MiB (128 at least, 2048 at most). tp_group: the ranks that hold the vocabulary in equal
    shards, in rank order; `weight` is then this rank's shard and everything else is the same on every rank.
    Every other argument, the result and the errors are grpo_loss's.
    """
    check.head(hidden, weight)
    check.ids(target_ids, hidden.shape[0], weight.shape[0] if tp_group is None else None, hidden)
    chunk = head.chunk_rows(chunk, hidden, weight)
    backend = choose(impl, hidden.device, hidden.dtype)
    loss = known_loss(config)
    tokens = prepare(hidden, target_ids, loss, backend, inputs)
    if tp_group is not None:
        from mgrpo.ops import tensor_parallel

        return tensor_parallel.loss(hidden, weight, tokens, loss, chunk, fast(backend), tp_group)
    if backend == "reference":
        logits = head.plain_logits(hidden, weight)
        return token_loss(*row_logprob(logits, tokens.target_ids, config.temperature), tokens, loss)
    from mgrpo.ops import library, library_head

    if needs_two_phases(loss, tokens.old_logprobs is not None):
        active = tokens.active(loss)
        logp, entropy, *_ = library_head.linear_logprob(
            hidden, weight, tokens.target_ids, active, config.temperature, chunk, backend
        )
        return token_loss(logp, entropy, tokens, loss)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    value, metrics, _, _ = library_head.linear_grpo_loss(
        hidden, weight, *library.flatten(tokens), encode(config), chunk, needs, backend
    )
    return value, library.name_metrics(metrics)
