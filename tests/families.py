"""Tiny models of many architectures, random weights, for what depends on the architecture alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models import VOCAB

CONTEXT = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
_EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _SHAPE,
    "Mistral": {**_SHAPE, "sliding_window": None},
    "Qwen2": _SHAPE,
    "Qwen3": {**_SHAPE, "head_dim": 8},
    "Olmo2": _SHAPE,
    "SmolLM3": {**_SHAPE, "no_rope_layer_interval": 2, "pad_token_id": None},
    "Phi3": {**_SHAPE, "pad_token_id": None},
    "Glm4": {**_SHAPE, "head_dim": 8, "pad_token_id": None},
    "Gemma2": {**_SHAPE, "head_dim": 8},
    "Gemma3Text": {**_SHAPE, "head_dim": 8, "sliding_window": 128},
    "Granite": {**_SHAPE, "logits_scaling": 8.0},
    "Cohere": _SHAPE,
    "Phi": _SHAPE,
    "GPTJ": {**_GPT, "rotary_dim": 4},
    "GPT2": _GPT,
    "OPT": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": CONTEXT,
    },
    "GPTNeo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": CONTEXT,
    },
    "Bert": {**_SHAPE, "is_decoder": False},
    "Olmo3": {**_SHAPE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128},
    "Ministral3": {**_SHAPE, "head_dim": 8},
    "MiniMaxM2": {**_SHAPE, **_LOCAL_EXPERTS, "head_dim": 8, "rotary_dim": 4},
    "Gemma3": {
        "text_config": {**_SHAPE, "head_dim": 8, "sliding_window": 128, "pad_token_id": None},
        "vision_config": {**_VISION, "num_hidden_layers": 2, "num_attention_heads": 2},
        "mm_tokens_per_image": 4,
    },
    "Qwen3_5": {
        "text_config": {
            **_SHAPE,
            **_LINEAR,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "vision_config": {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
    },
    "Llama4Text": {**_SHAPE, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "Bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "Mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Rwkv": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "context_length": CONTEXT,
    },
    "FalconH1": {**_SHAPE, "head_dim": 8, "mamba_d_ssm": 64, **_MAMBA},
    "Bamba": {**_SHAPE, "attn_layer_indices": [1], **_MAMBA},
    "Lfm2": {**_SHAPE, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Lfm2Moe": {
        **_SHAPE,
        **_EXPERTS,
        "layer_types": ["conv", "full_attention"],
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "Qwen3Next": {
        **_SHAPE,
        **_EXPERTS,
        **_LINEAR,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Glm4Moe": {
        **_SHAPE,
        "head_dim": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "GptOss": {**_SHAPE, **_LOCAL_EXPERTS, "head_dim": 8, "sliding_window": 128},
    "Qwen3Moe": {**_SHAPE, **_EXPERTS, "head_dim": 8, "moe_intermediate_size": 16},
    "Qwen2Moe": {
        **_SHAPE,
        **_EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Mixtral": {**_SHAPE, **_LOCAL_EXPERTS},
    "DeepseekV2": {**_SHAPE, **_LATENT},
    "DeepseekV3": {**_SHAPE, **_LATENT},
    "Olmoe": {**_SHAPE, **_EXPERTS},
    "GPTNeoX": _SHAPE,
}


def family(name: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model of the architecture with the settings of FAMILIES and `changes`; one that sees too as it
    is published, whole."""
    torch.manual_seed(seed)
    settings = FAMILIES[name]
    if "vision_config" in settings:
        settings = {**settings, "text_config": {**settings["text_config"], **changes}}
        config = getattr(transformers, f"{name}Config")(**settings)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()
