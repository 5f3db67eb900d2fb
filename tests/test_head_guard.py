"""What stands between the hidden states and the logits of a model is seen when it is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgrpo.errors import ConfigError
from mgrpo.model import architecture
from mgrpo.model.policy import Policy
from tests.families import family
from tests.models import VOCAB, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Gemma2", {}, "config.json has final_logit_softcapping=30"),
        ("Gemma3Text", {"final_logit_softcapping": 20.0}, "config.json has final_logit_softcapping=20"),
        ("Granite", {}, "config.json has logits_scaling=8"),
        ("Cohere", {}, "config.json has logit_scale=0.0625"),
        ("FalconH1", {"lm_head_multiplier": 0.5}, "config.json has lm_head_multiplier=0.5"),
        ("Phi", {}, "it has lm_head.bias behind its backbone"),
        ("GPTJ", {}, "it has lm_head.bias behind its backbone"),
        ("Bert", {"is_decoder": True}, "behind its backbone"),
    ],
)
def test_a_changed_head_is_refused_by_name(name: str, changes: dict[str, Any], words: str) -> None:
    """Weights as they are made show none of it: caps are far away and biases are 0."""
    with pytest.raises(ConfigError, match=rf"tiny: the logits of \w+ are not hidden @ head.T: .*{words}"):
        Policy(family(name, **changes), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": None}),
        ("Granite", {"logits_scaling": 1.0}),
        ("Cohere", {"logit_scale": 1.0}),
        ("FalconH1", {}),
        ("OPT", {}),
        ("Llama4Text", {}),
    ],
)
def test_a_plain_head_is_taken_whatever_else_the_model_has(name: str, changes: dict[str, Any]) -> None:
    """Neutral values, caps inside the attention, and models that call their decoder past the backbone."""
    model = family(name, **changes)
    policy = Policy(model, tiny_tokenizer(), "tiny")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(policy.hidden(ids) @ policy.head_weight.T, logits, rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """A head whose weight is the plain one and whose output is not."""

    def __init__(self, head: nn.Linear, after: Any) -> None:
        super().__init__()
        self.weight, self.after = head.weight, after

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.after(hidden @ self.weight.T)
        return out


@pytest.mark.parametrize(
    "after",
    [
        lambda z: 50 * torch.tanh(z / 50),
        lambda z: z * 1.01,
        lambda z: z - 0.01 * z.clamp(min=90),
        lambda z: z.log_softmax(-1),
    ],
    ids=["cap", "scale", "bend at 90", "normalised"],
)
def test_a_change_without_a_name_shows_in_numbers(after: Any) -> None:
    """The hidden states are scaled until the logits leave the range in which the change is small."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-2)
    model.lm_head = Odd(model.lm_head, after)
    with pytest.raises(
        ConfigError, match=r"not hidden @ head.T: where the largest logit is .* they differ by"
    ):
        Policy(model, tiny_tokenizer(), "tiny")


def test_heads_that_are_no_matrix_are_refused() -> None:
    """No head, several heads, and weights that are not floating point."""
    model = tiny_model("llama")
    model.lm_head = nn.ModuleList([model.lm_head])
    with pytest.raises(
        ConfigError, match="the head of LlamaForCausalLM is a ModuleList, expected one matrix"
    ):
        Policy(model, tiny_tokenizer(), "tiny")
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ConfigError, match=r"the head's weight is torch.int8; take weights that are not quantised"
    ):
        Policy(model, tiny_tokenizer(), "tiny")


def test_a_model_that_looks_ahead_is_refused() -> None:
    """Padding behind a row must not change it: a bidirectional model is no causal one, whatever its class says."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, arguments, named: (
                arguments,
                {**named, "hidden_states": named["hidden_states"] + named["hidden_states"].mean(1, True)},
            ),
            with_kwargs=True,
        )
    with pytest.raises(ConfigError, match="does not compute a padded row as its sequence alone"):
        Policy(model, tiny_tokenizer(), "tiny")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
        ({"logits_soft_cap": 15}, "logits_soft_cap=15"),
        ({"output_logit_soft_cap": 30.0}, "output_logit_soft_cap=30"),
        ({"logits_scaling": 4}, "logits_scaling=4"),
        ({"output_multiplier": 0.2}, "output_multiplier=0.2"),
        ({"logits_mup_width_multiplier": 24.0}, "logits_mup_width_multiplier=24"),
        ({"softcap": 20.0}, "softcap=20"),
        ({"lm_head_bias": True}, "lm_head_bias=True"),
        ({"text_config": {"logit_scale": 0.5}}, "logit_scale=0.5"),
        ({"final_logit_softcapping": None, "logits_scaling": 1.0, "lm_head_multiplier": 1}, None),
        ({"attn_logit_softcapping": 50.0, "moe_router_logit_softcapping": 2.0}, None),
        ({"attention_multiplier": 2.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2}, None),
        ({"routed_scaling_factor": 2.5, "logit_scale_init_value": 2.6, "max_logit_scale": 100.0}, None),
        ({"output_hidden_states": 2, "num_logits_to_keep": 5, "lm_head_bias": False}, None),
    ],
)
def test_a_configuration_tells_what_follows_the_head(config: dict[str, Any], expected: str | None) -> None:
    """Caps and scales of the logits, under the names that architectures give them; not those inside the layers."""
    assert architecture.after_head(config) == expected


def test_every_policy_has_one_row_of_the_head_a_token() -> None:
    """A tokenizer with an id beyond the head is refused, also where it has few tokens."""
    with pytest.raises(ConfigError, match=f"200 tokens up to id 199, the model's head {VOCAB} rows"):
        Policy(tiny_model("shift"), tiny_tokenizer(200), "tiny")
