"""Padded input as packed: (B, S) is B trajectories of S rows each, one behind the other, whose mask says which rows are
tokens. Only vectors are laid out anew; hidden states and logits stay where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mgrpo.ops.grpo_loss import LossInputs

_PER_TOKEN = (
    "loss_mask",
    "token_weight",
    "token_advantages",
    "old_logprobs",
    "ref_logprobs",
    "rollout_logprobs",
)


def as_packed(target_ids: Tensor, inputs: LossInputs) -> tuple[Tensor, LossInputs]:
    """target_ids (T,), contiguous, and packed inputs with cu_seqlens, of packed ones or of padded ones (B, S).

    Raises TypeError/ValueError naming cu_seqlens where it is missing or not wanted, and an input of another shape than
    (B, S).
    """
    cu_seqlens = inputs.get("cu_seqlens")
    if target_ids.dim() == 1:
        if cu_seqlens is None:
            raise TypeError("cu_seqlens: missing; packed input (T,) needs it, padded input (B, S) does not")
        return target_ids.contiguous(), inputs
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens: given with padded target_ids {tuple(target_ids.shape)}; it delimits packed ones, (T,)"
        )
    b, s = target_ids.shape
    flat = dict(inputs)
    for name in _PER_TOKEN:
        flat[name] = _flat(name, flat.get(name), (b, s))
    advantages = flat.get("advantages")
    if isinstance(advantages, Tensor) and advantages.shape != (b,):
        flat["advantages"] = _flat("advantages", advantages, (b, s), f"({b},) or ")
    flat["cu_seqlens"] = torch.arange(b + 1, device=target_ids.device) * s
    return target_ids.reshape(-1).contiguous(), cast("LossInputs", flat)


def _flat(name: str, x: object, shape: tuple[int, int], other: str = "") -> object:
    if not isinstance(x, Tensor):
        return x  # None, or what the check of its type refuses
    if x.shape != shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)} where {other}{shape} is needed")
    return x.reshape(-1)
