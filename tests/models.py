"""Tiny policies for the tests: our own decoder and a Llama, random weights, a word-level tokenizer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.model.policy import Policy
from mgrpo.tasks.atlas.decoder import ShiftDecoderConfig, ShiftDecoderForCausalLM

Kind = Literal["shift", "llama"]
VOCAB = 101


def tiny_tokenizer(size: int = VOCAB) -> Any:
    """Words w0, w1, ... with their number as id."""
    words = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", clean_up_tokenization_spaces=False
    )


def tiny_model(kind: Kind, seed: int = 0) -> Any:
    """Weights large enough that the next token depends on the whole prompt."""
    torch.manual_seed(seed)
    if kind == "shift":
        model = ShiftDecoderForCausalLM(
            ShiftDecoderConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=2,
                max_position_embeddings=64,
                embedding_std=0.3,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.3,
            )
        )
    return model.eval()


def tiny_policy(kind: Kind = "shift", seed: int = 0) -> Policy:
    return Policy(tiny_model(kind, seed), tiny_tokenizer(), kind)
