"""What a model's configuration says of its architecture: positions, windows, layers, what follows its head.

Everything here reads plain dictionaries, a config.json or a transformers configuration's `to_dict()`, so that the
launcher can ask before anything is loaded; neither torch nor transformers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "context_length",
    "max_target_positions",
)
"""Names that architectures give to the longest sequence; the first that holds a number counts."""
_TEXT = ("text_config", "llm_config", "language_config")  # of a model that also sees or listens
_AFTER_HEAD = re.compile(
    r"(logits?|lm_head|output|unembed)[a-z_]*(soft_?cap|scal|multipl|divisor)|^(final_)?soft_?cap"
)
_ELSEWHERE = re.compile(
    r"attn|attention|router|moe|expert|mlp|vision|image|audio|contrastive|init|max_|hidden"
)
_WINDOWS = re.compile(r"(^|_)window(_size)?$|^attention_chunk_size$")
_NO_TEXT_WINDOWS = re.compile(r"vision|image|audio|max_window|pretrained")
ATTENTION = frozenset({"full_attention", "sliding_attention", "attention"})
"""Kinds of layers that attend to tokens one by one and keep nothing else of a sequence."""


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about the language model."""
    for name in _TEXT:
        if isinstance(config.get(name), Mapping):
            text: Mapping[str, Any] = config[name]
            return text
    return config


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence; None where the configuration names no bound (state-space models, ALiBi)."""
    text = text_of(config)
    return next((value for name in _POSITIONS if _count(value := text.get(name))), None)


def after_head(config: Mapping[str, Any]) -> str | None:
    """What the configuration applies to the logits behind the head, as `name=value`; None for nothing."""
    for part in (text_of(config), config):
        for name, value in part.items():
            if name == "lm_head_bias" and value is True:
                return f"{name}={value}"
            about_logits = _AFTER_HEAD.search(name) and not _ELSEWHERE.search(name)
            if about_logits and _number(value) and value != (0 if "cap" in name else 1):
                return f"{name}={value:g}"
    return None


def windows(config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens within which some layers attend, by the name of the setting."""
    text = text_of(config)
    found = {
        name: value
        for name, value in text.items()
        if _WINDOWS.search(name) and not _NO_TEXT_WINDOWS.search(name) and _count(value)
    }
    kinds = layer_kinds(config)
    if text.get("use_sliding_window") is False or (kinds and "sliding_attention" not in kinds):
        found.pop("sliding_window", None)
    return found


def layer_kinds(config: Mapping[str, Any]) -> frozenset[str]:
    """Kinds of the layers where the configuration lists them, else empty."""
    text = text_of(config)
    listed = next(
        (text[n] for n in ("layer_types", "layers_block_type") if isinstance(text.get(n), list)), ()
    )
    return frozenset(str(kind) for kind in listed)


def rotation_by_length(config: Mapping[str, Any]) -> str | None:
    """The kind of rotary positions that depends on the longest sequence of a forward pass; None where none does."""
    text = text_of(config)
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name)
        if isinstance(found, Mapping):  # of all layers, or of each kind of layer
            for part in (found, *(v for v in found.values() if isinstance(v, Mapping))):
                kind = part.get("rope_type", part.get("type"))
                if kind in ("dynamic", "longrope"):
                    return str(kind)
    return None


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How configurations call the number of experts of a layer."""


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether it counts experts, under whatever name (num_experts, num_local_experts, n_routed_experts, ...)."""
    return any("expert" in name and _count(value) for name, value in text_of(config).items())


def quantized(config: Mapping[str, Any]) -> str | None:
    """The method by which the weights on disk are quantised; None for plain weights."""
    found = config.get("quantization_config") or text_of(config).get("quantization_config")
    return str(found.get("quant_method", "quantization_config")) if isinstance(found, Mapping) else None


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
