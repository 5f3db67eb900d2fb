"""Models whose tokens depend on more than their own row's tree: refused by name or by the try, which holds a prefix
too."""

from __future__ import annotations

import pytest
import torch
import transformers

from mgrpo.config.policy import PolicyConfig
from mgrpo.model.policy import Policy
from tests.families import FAMILIES, family
from tests.models import tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # transformers', of ids of tiny models
]


def test_attention_that_is_called_twice_in_a_layer() -> None:
    """Differential attention has two pairs of keys and values a layer, of which a held prefix would keep one."""
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(**FAMILIES["Llama"])
    policy = Policy(transformers.DiffLlamaForCausalLM(config), tiny_tokenizer(), "twice", PolicyConfig())
    assert not policy.shares and "not what each is alone" in (policy.why_not or "")


@pytest.mark.parametrize("name", ["DeepseekV2", "DeepseekV3"])
def test_values_of_another_size(name: str) -> None:
    """Latent attention as it is published; the reason names both sizes."""
    policy = Policy(family(name, v_head_dim=4), tiny_tokenizer(), name, PolicyConfig())
    assert not policy.shares and "8 numbers a head in its keys and 4 in its values" in (policy.why_not or "")
