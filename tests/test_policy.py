"""Policies on disk and on the wire: what was saved comes back, and what cannot be trained is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from mgrpo.errors import ConfigError
from mgrpo.model.groups import width_groups
from mgrpo.model.policy import (
    FORWARD_COST,
    Policy,
    load_policy,
    load_state_bytes,
    save_policy,
    state_bytes,
    state_of,
)
from tests.models import VOCAB, tiny_model, tiny_policy, tiny_tokenizer

IDS = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_a_saved_policy_comes_back_bit_for_bit(kind, tmp_path: Path):
    """Weights and tokenizer survive; saving again over the folder leaves nothing beside it."""
    policy = tiny_policy(kind)
    save_policy(policy, tmp_path / "p")
    again = load_policy(tmp_path / "p")
    assert torch.equal(again.hidden(IDS), policy.hidden(IDS))
    assert again.tokenizer.encode("w3 w17") == [3, 17]
    assert again.tokenizer.decode([3, 17]) == "w3 w17"
    other = tiny_policy(kind, seed=5)
    save_policy(other, tmp_path / "p")
    assert torch.equal(load_policy(tmp_path / "p").hidden(IDS), other.hidden(IDS))
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_hidden_states_times_head_are_the_models_logits(kind):
    """Right-padded rows without a mask: the logits of every real token are those of the row alone."""
    policy = tiny_policy(kind)
    lengths = torch.tensor([9, 4, 6])
    hidden = policy.hidden(IDS, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = policy.model(IDS[row : row + 1, :n]).logits[0]
        torch.testing.assert_close(hidden[row, :n] @ policy.head_weight.T, alone, rtol=1e-4, atol=1e-4)


def test_lengths_that_do_not_fit_are_named():
    """A row of more tokens than columns, or of none, cannot be meant."""
    policy = tiny_policy()
    for lengths in ([9, 10, 1], [9, 0, 1], [9, 9]):
        with pytest.raises(ValueError, match="do not fit rows of shape"):
            policy.hidden(IDS, torch.tensor(lengths))


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_weights_travel_as_bytes(kind):
    """state_bytes is safetensors, tied tensors once; loading in place makes models equal and keeps ties."""
    source, target = tiny_model(kind, seed=1), tiny_model(kind, seed=2)
    data = state_bytes(source)
    assert safetensors.torch.load(data).keys() == state_of(source).keys()
    parameter = next(target.parameters())
    load_state_bytes(target, data)
    assert next(target.parameters()) is parameter
    assert torch.equal(target(IDS).logits, source(IDS).logits)
    if kind == "shift":
        assert target.lm_head.weight is target.model.embed_tokens.weight


def test_foreign_weights_are_refused_and_change_nothing():
    """Missing, unexpected and misshapen tensors and broken bytes each raise; the model keeps its weights."""
    model = tiny_model("shift")
    before = state_bytes(model)
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    cases = {
        "weights lack model.norm.weight": {n: t for n, t in state.items() if n != "model.norm.weight"},
        "weights have extra, which": state | {"extra": torch.zeros(1)},
        r"model.norm.weight of shape \(3,\), expected \(32,\)": state | {"model.norm.weight": torch.zeros(3)},
    }
    for message, bad in cases.items():
        zeroed = {
            n: (t if n in ("extra", "model.norm.weight") else torch.zeros_like(t)) for n, t in bad.items()
        }
        with pytest.raises(ValueError, match=message):
            load_state_bytes(model, safetensors.torch.save(zeroed))
    with pytest.raises(ValueError, match="5 bytes of weights are not in safetensors"):
        load_state_bytes(model, b"abcde")
    assert state_bytes(model) == before


def test_broken_folders_are_named(tmp_path: Path):
    """One line that names the folder and what is missing in it."""
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no config.json"):
        load_policy(tmp_path / "empty")
    tiny_model("shift").save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"bare: no tokenizer loads from it"):
        load_policy(tmp_path / "bare")
    save_policy(tiny_policy(), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cut: no causal language model loads from it"):
        load_policy(tmp_path / "cut")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match=r"bare: no causal language model"):
        load_policy(tmp_path / "bare")


def test_models_the_fused_loss_cannot_train_are_refused():
    """A soft cap after the head, and a tokenizer larger than the head."""
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.3,
    )
    with pytest.raises(ConfigError, match=r"logits of Gemma2ForCausalLM are not hidden @ head.T"):
        Policy(Gemma2ForCausalLM(config), tiny_tokenizer())
    with pytest.raises(ConfigError, match=f"tokenizer has 200 tokens, the model's head {VOCAB}"):
        Policy(tiny_model("shift"), tiny_tokenizer(200))


def test_importing_the_package_loads_no_transformers():
    """Neither mgrpo nor mgrpo.model.policy imports transformers."""
    code = "import sys, mgrpo, mgrpo.model.policy; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("kind", ["shift", "llama"])
def test_states_that_score_tokens_are_those_of_one_padded_forward(kind):
    """Rows of many lengths, grouped: states and gradients are those of hidden(...)[:, :-1][scored]."""
    policy = tiny_policy(kind)
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 61, (40,), generator=rng)
    ids = torch.randint(VOCAB, (40, 60), generator=rng)
    scored = (torch.rand(40, 59, generator=rng) < 0.3) & (torch.arange(1, 60) < lengths[:, None])
    results = []
    for states in (policy.hidden(ids, lengths)[:, :-1][scored], policy.hidden_before(ids, lengths, scored)):
        grads = torch.autograd.grad(states.pow(2).mean(), list(policy.parameters()), allow_unused=True)
        results.append([states, *[g for g in grads if g is not None]])
    for plain, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, plain, rtol=1e-4, atol=1e-5)
    assert len(width_groups(lengths.numpy(), FORWARD_COST)) > 2
