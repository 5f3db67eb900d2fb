"""Tiny policies for the tests: our own decoder and a Llama, random weights, a word-level tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mgrpo.engines.hf.load import WeightLoader
from mgrpo.model.places import check_fit, places_of
from mgrpo.model.policy import Policy, state_from_bytes, trained_state
from mgrpo.model.stream import WeightStream
from mgrpo.tasks.atlas.decoder import ShiftDecoderConfig, ShiftDecoderForCausalLM

Kind = Literal["shift", "llama"]
VOCAB = 101


@torch.no_grad()
def move_adapters(policy: Policy) -> None:
    """Away from their start, where B is 0: every trained weight by a random step."""
    g = torch.Generator().manual_seed(7)
    for parameter in policy.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))


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


def state_bytes(model: torch.nn.Module) -> bytes:
    """A version as it is published, in safetensors format."""
    return safetensors.torch.save(
        {name: t.detach().contiguous().cpu() for name, t in WeightStream(model).read()}
    )


def load_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Into the model in place, as an engine does it. Raises ValueError where they do not fit."""
    WeightLoader(functools.partial(places_of, model)).copy(state)


def load_state_bytes(model: torch.nn.Module, data: bytes) -> None:
    """Raises ValueError where they are not in safetensors format or do not fit."""
    load_state(model, state_from_bytes(data))


def load_trained_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """What of a model trains, from another one. Raises ValueError where names or shapes differ."""
    own = trained_state(model)
    check_fit(*({name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, state)))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
