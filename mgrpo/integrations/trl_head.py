"""The M-GRPO loss inside a Hugging Face model's forward: `add_grpo_head`.

The head and the loss are computed below the wrappers of DDP and FSDP, which reduce gradients and gather weights by
hooks on the model's own forward: a trainer that ran the backbone itself would lose them without a word.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mgrpo
from mgrpo.errors import ConfigError

_BEHIND_HEAD = {
    "final_logit_softcapping": (None, 0, 0.0),
    "logit_scale": (None, 1, 1.0),
    "output_multiplier": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
}
"""What configurations of transformers apply to the logits behind the head, each with the values that change nothing."""


def add_grpo_head(
    model: Any, *, head_in_float32: bool = False, vocabulary: Sequence[int] | None = None
) -> Any:
    """Give a causal language model of transformers, in place, a second way through its forward; returns the model.

    `model(input_ids=ids, attention_mask=mask, grpo=inputs)` returns {"loss": 0-d tensor, "metrics": {name: 0-d tensor}}
    as `mgrpo.linear_grpo_loss` does, and no logits ever exist whole. ids (B, S) int64. inputs: the keyword arguments of
    `linear_grpo_loss` beside hidden, weight and target_ids: `config`, `loss_mask` (B, C) and whatever else is per token
    (B, C) or per row (B,), about the last C < S tokens of each row of ids. With `loss_mask` and `temperature` alone,
    {"logprobs": (B, C)} is returned: those of the policy, 0 where the mask is.

    Without `grpo` the forward is the model's own, so generation and evaluation are unchanged. A model that PEFT wraps
    takes the head on what it wraps; add it before DDP or FSDP wrap the model.

    Under torch.autocast the head's operands are rounded to its dtype, else they are multiplied in the dtypes that they
    have; logits are float32 either way. head_in_float32: the operands are float32 (TRL's cast_lm_head_to_fp32).
    vocabulary: ids, in increasing order, of the rows of the head that are tokens; the other rows take no part in any
    distribution. None: all rows.

    Raises ConfigError where the model does something to its logits behind the head that the loss does not know: a bias,
    a scale, a soft cap.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    _check(base)
    plain = base.forward
    ids = None if vocabulary is None else _known(vocabulary, base)

    # The signature is the class's, against which `generate` validates the arguments of the model.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, grpo: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if grpo is None:
            return plain(*args, **kwargs)
        return _loss(self, ids, head_in_float32, grpo, *args, **kwargs)

    base.forward = types.MethodType(forward, base)
    return model


def _loss(
    model: Any, vocabulary: Tensor | None, in_float32: bool, grpo: dict[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The loss of one call. Backbone and head are looked up now: FSDP and PEFT replace them after the head is added."""
    input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    width = grpo["loss_mask"].shape[1]
    if not 0 < width < input_ids.shape[1]:
        raise ValueError(
            f"loss_mask: {width} tokens a row, expected at least 1 and fewer than the {input_ids.shape[1]} of input_ids"
        )
    hidden = model.base_model(*args, **(kwargs | {"use_cache": False})).last_hidden_state
    hidden = hidden[:, -width - 1 : -1]  # the state of token t - 1 scores token t
    weight = model.get_output_embeddings().weight
    if hasattr(weight, "full_tensor"):  # a DTensor of FSDP2
        weight = weight.full_tensor()
    hidden = hidden.to(weight.device)
    targets = input_ids[:, -width:]
    if vocabulary is not None:
        last = len(vocabulary) - 1
        if int(vocabulary[-1]) == last:  # in main memory: no wait for the device
            weight = weight[: last + 1]
        else:
            rows = vocabulary.to(weight.device)
            weight, targets = weight.index_select(0, rows), torch.searchsorted(rows, targets.contiguous())
        targets = targets.clamp(max=last)
    device = hidden.device.type
    if in_float32:
        hidden = hidden.float()
    elif torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if "config" not in grpo:
        return {"logprobs": mgrpo.selective_logprob(hidden, weight, targets, **grpo)[0]}
    loss, metrics = mgrpo.linear_grpo_loss(hidden, weight, targets, **grpo)
    return {"loss": loss, "metrics": metrics}


def _known(vocabulary: Sequence[int], model: Any) -> Tensor:
    ids = torch.tensor(list(vocabulary), dtype=torch.int64)
    rows = model.get_output_embeddings().weight.shape[0]
    if not len(ids) or bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= rows:
        raise ConfigError(
            f"vocabulary: expected ids in increasing order, each at least 0 and below the head's {rows} rows"
        )
    return ids


def _check(model: Any) -> None:
    """ConfigError where logits are not hidden states times the head's weight."""
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None or getattr(model, "base_model", model) is model:
        raise ConfigError(f"{name}: no language model of transformers with a backbone and a vocabulary head")
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{name}: its head has a bias, which the loss does not know; use a model without one"
        )
    if hasattr(head, "lora_A"):
        raise ConfigError(
            f"{name}: its head has an adapter, which would never train; take the head out of target_modules"
        )
    config = model.config.get_text_config()
    for setting, neutral in _BEHIND_HEAD.items():
        value = getattr(config, setting, None)
        if value not in neutral:
            raise ConfigError(
                f"{name}: {setting} {value} acts on the logits behind the head, which the loss does not know; use a "
                "model without it"
            )
