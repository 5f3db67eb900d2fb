"""Log-probs and entropies of given tokens, without the [T, V] logits: for old and reference policies.

z = hidden weight^T / temperature,  logp_t = z[t, id_t] - lse(z_t),  entropy_t = lse(z_t) - sum_v p_v z_v
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgrpo.config.loss import TEMPERATURES
from mgrpo.ops import check, head
from mgrpo.ops.backend import choose, fast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def selective_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    loss_mask: Tensor | None = None,
    chunk: int | None = None,
    tp_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy), each of target_ids' shape in nats; forward only. Row t of `hidden` scores target_ids[t].

    hidden (T, H) or (B, S, H) and weight (V, H) as in linear_grpo_loss, target_ids int64 (T,) or (B, S). The result is
    float64 for float64 input and float32 otherwise. A row whose logits hold NaN or +inf gives NaN in both. chunk: rows
    of logits that exist at one time; None as in linear_grpo_loss.

    loss_mask: of target_ids' shape; rows where it is 0 are not computed and give 0, and their target may be -100.
    None: every row. tp_group: the ranks that hold the vocabulary in equal shards, in rank order; `weight` is this
    rank's.

    Raises TypeError/ValueError naming the argument, among them a target id outside [0, V) (on the CPU).
    """
    check.head(hidden, weight)
    vocabulary = weight.shape[0] if tp_group is None else None
    check.ids(target_ids, hidden.shape[:-1], vocabulary, hidden, loss_mask)
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(f"temperature: {temperature} is outside [{low}, {high}]")
    chunk = head.chunk_rows(chunk, hidden, weight)
    backend = choose(impl, hidden.device, hidden.dtype)
    if tp_group is not None:
        fast(backend)
    ids = target_ids.reshape(-1).contiguous()
    active = torch.ones_like(ids, dtype=torch.bool) if loss_mask is None else loss_mask.reshape(-1) != 0
    logp, entropy = rows_logprob(hidden, weight, ids, active, temperature, chunk, backend, tp_group)
    return logp.reshape(target_ids.shape), entropy.reshape(target_ids.shape)


def rows_logprob(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    active: Tensor,
    temperature: float,
    chunk: int,
    backend: str,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) (T,) of the rows of hidden (T, H) or (B, S, H) where `active` (T,) is True, 0 in the others."""
    with torch.no_grad():
        if tp_group is not None:
            from mgrpo.ops import tensor_parallel

            shard = tensor_parallel.Sharded(backend, tp_group, weight.shape[0])
            return head.logprob(hidden, weight, target_ids, active, temperature, chunk, shard)[:2]
        if backend == "reference":
            found = _reference(hidden.flatten(0, -2), weight, target_ids, temperature, chunk)
            logp, entropy = (torch.where(active, x, 0.0) for x in found)
            return logp, entropy
        from mgrpo.ops import library_head

        out = library_head.linear_logprob(hidden, weight, target_ids, active, temperature, chunk, backend)
        return out[0], out[1]


def _reference(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    empty = hidden.new_zeros(0, dtype=compute_dtype(hidden))
    parts = [(empty, empty)]
    for h, ids in zip(torch.split(hidden, chunk), torch.split(target_ids, chunk), strict=True):
        parts.append(row_logprob(head.plain_logits(h, weight), ids, temperature))
    logp, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    return logp, entropy


def row_logprob(logits: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of each row of logits (T, V), differentiable: the definition.

    -inf logits have probability 0 and add nothing to the entropy. A row without a finite log-sum-exp, or whose
    target has probability 0 or an id out of range, gives NaN and passes no gradient.
    """
    z = logits.to(compute_dtype(logits))
    with torch.no_grad():
        largest = z.amax(1, keepdim=True)
    z = (z - largest) / temperature  # the largest first: z / temperature may overflow
    known = (target_ids >= 0) & (target_ids < z.shape[1])
    target_ids = torch.where(known, target_ids, 0)
    with torch.no_grad():
        target = z.gather(1, target_ids[:, None]).squeeze(1)
        bad = ~(known & largest.squeeze(1).isfinite() & z.logsumexp(1).isfinite() & target.isfinite())
    z = torch.where(bad[:, None], 0.0, z)
    logp = z.log_softmax(1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(1)
    picked = logp.gather(1, target_ids[:, None]).squeeze(1)
    return torch.where(bad, float("nan"), picked), torch.where(bad, float("nan"), entropy)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
