"""One forward on the slot cache, and whether a model can be served that way at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mgrpo.engines.hf.kv_cache import SlotCache
from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.groups import Int64
from mgrpo.model.policy import Policy


def feed(policy: Policy, cache: SlotCache, rows: Int64, start: Int64, ids: Int64, counts: Int64) -> Tensor:
    """Hidden states (R, W, H) of new tokens ids (R, W), of which counts (R,) are real: those of slot rows[r] go behind
    the start[r] tokens that it holds already."""
    device = policy.device
    new = ids.shape[1]
    columns = start[:, None] + np.arange(new)
    width = int(columns[:, -1].max()) + 1
    cache.plan(torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(counts), device)
    where = cache.columns
    mask = torch.zeros(len(rows), 1, new, width, dtype=policy.head_weight.dtype, device=device)
    mask.masked_fill_(torch.arange(width, device=device) > where[:, None, :, None], float("-inf"))
    # Padding may stand beyond the last position; what is computed there is never read.
    bound = policy.context_length
    positions = where if new == 1 or bound is None else where.clamp(max=bound - 1)
    return policy.step(torch.from_numpy(ids).to(device), mask, positions, cache)


def check_served(policy: Policy, layers: int, max_length: int) -> None:
    """Raises ConfigError where histories of max_length tokens on a slot cache are not what the policy computes from
    the whole history: the cache keeps keys and values under one causal mask, and nothing else of a history.

    Judged by the configuration first, then by two short histories, since what a window or a state leaves out may not
    show in a few tokens or in freshly made weights. Raises ValueError where max_length exceeds a window.
    """
    model = policy.model
    config = model.config.to_dict()
    advice = 'serve it with engine.type "vllm"'
    refused = f"{policy.name}: the in-process engine cannot serve {type(model).__name__}: "
    if kept := architecture.layer_kinds(config) - architecture.ATTENTION:
        raise ConfigError(
            f"{refused}it has {', '.join(sorted(kept))} layers, which are no full attention; {advice}"
        )
    if getattr(model, "_is_stateful", False):
        raise ConfigError(f"{refused}its layers carry a state from token to token; {advice}")
    for name, window in architecture.windows(config).items():
        if window < max_length:
            raise ValueError(
                f"{policy.name} attends within {window} tokens ({name}); max_length {max_length} must not exceed it"
            )
    try:
        off = _difference(policy, SlotCache(layers, 2, min(8, max_length)), min(5, max_length - 1))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise ConfigError(
            f"{refused}it takes no cache with a mask and positions ({error}); {advice}"
        ) from error
    if not off <= (1e-2 if policy.head_weight.dtype == torch.float32 else 0.1):
        raise ConfigError(
            f"{refused}its hidden states on a cache differ by {off:.2g} of their size; {advice}"
        )


@torch.inference_mode()
def _difference(policy: Policy, cache: SlotCache, length: int) -> float:
    """How far two ragged histories, fed at once and then one token each, are from the whole ones, relative to the size
    of the hidden states. In half precision the middle difference: one token may go to another expert."""
    ids = (np.arange(2 * (length + 1)) % 2 ^ (np.arange(2 * (length + 1)) // 3 % 2)).reshape(2, -1)
    rows, counts = np.arange(2), np.array([length, max(length - 2, 1)])
    first = feed(policy, cache, rows, np.zeros(2, np.int64), ids[:, :length], counts)
    following = feed(policy, cache, rows, counts, ids[rows, counts][:, None], np.ones(2, np.int64))
    off = []
    for row, n in enumerate(counts.tolist()):
        whole = policy.hidden(torch.from_numpy(ids[row : row + 1, : n + 1]).to(policy.device))[0]
        here = torch.cat([first[row, :n], following[row]])
        off.append((here - whole).norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-6))
    every = torch.cat(off).float()
    return float(every.max() if policy.head_weight.dtype == torch.float32 else every.median())
