"""Models whose tokens depend on more than their own row's tree: refused by name or by the try, which holds a prefix
too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mgrpo.config.policy import PolicyConfig
from mgrpo.model.policy import Policy
from tests.families import CONTEXT, family
from tests.models import VOCAB, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # transformers', of ids of tiny models
]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotation_by_the_longest_sequence(kind: str) -> None:
    """A held prefix would be rotated by its own length, and what follows by another."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    changes: dict[str, Any] = {"rope_parameters": rope}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        changes["original_max_position_embeddings"] = rope["original_max_position_embeddings"] = CONTEXT // 4
    model = family("Phi3" if kind == "longrope" else "Llama", **changes)
    policy = Policy(model, tiny_tokenizer(), kind, PolicyConfig())
    assert not policy.shares and f'rope_type "{kind}"' in (policy.why_not or "")


def test_attention_that_is_called_twice_in_a_layer() -> None:
    """Differential attention has two pairs of keys and values a layer, of which a held prefix would keep one."""
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    policy = Policy(transformers.DiffLlamaForCausalLM(config), tiny_tokenizer(), "twice", PolicyConfig())
    assert not policy.shares and "not what each is alone" in (policy.why_not or "")


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_values_of_another_size(name: str) -> None:
    """Latent attention as it is published; the reason names both sizes."""
    policy = Policy(family(name, v_head_dim=4), tiny_tokenizer(), name, PolicyConfig())
    assert not policy.shares and "8 numbers a head in its keys and 4 in its values" in (policy.why_not or "")
