"""Weights leave a trainer under the names of its checkpoint, and come back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy, save_policy, state_of
from tests.families import family
from tests.models import load_state, load_state_bytes, state_bytes, tiny_model, tiny_tokenizer

MOE = ["Qwen3Moe", "Qwen2Moe", "Mixtral", "DeepseekV2", "DeepseekV3", "Olmoe", "GptOss"]
IDS = torch.arange(12).reshape(2, 6)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", [*MOE, "GPTNeoX"])
def test_published_names_are_the_checkpoints(name: str, tmp_path: Path) -> None:
    """What save_pretrained writes is what is published, tensor for tensor; a model of other weights becomes equal."""
    source, target = family(name, seed=1), family(name, seed=2)
    source.save_pretrained(tmp_path)
    disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    data = state_bytes(source)
    sent = safetensors.torch.load(data)
    assert sent.keys() == disk.keys()
    assert all(torch.equal(sent[n], t) for n, t in disk.items())
    where = {n: p.data_ptr() for n, p in target.named_parameters()}
    load_state_bytes(target, data)
    assert where == {n: p.data_ptr() for n, p in target.named_parameters()}  # in place
    assert all(torch.equal(t, target.state_dict()[n]) for n, t in source.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert state_of(loaded).keys() == disk.keys()
    load_state(target, state_of(loaded))


def test_experts_are_cut_without_a_copy() -> None:
    """Publishing holds no second set of the experts' weights."""
    model = family("Qwen3Moe")
    memory = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert {t.untyped_storage().data_ptr() for t in state_of(model).values()} <= memory


def test_weights_under_names_in_memory_are_taken_too() -> None:
    """A trainer that was loaded from a checkpoint with fused experts publishes them fused."""
    source, target = family("Qwen3Moe", seed=1), family("Qwen3Moe", seed=2)
    load_state(target, source.state_dict())
    assert torch.equal(target(IDS).logits, source(IDS).logits)


def test_experts_that_do_not_fit_change_nothing() -> None:
    """One expert less, or of another shape, is named, and the model keeps its weights."""
    model = family("Qwen3Moe")
    before = state_bytes(model)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    state = {n: torch.zeros_like(t) for n, t in state_of(model).items()}
    with pytest.raises(ValueError, match=f"{name} of shape"):
        load_state(model, state | {name: torch.zeros(3)})
    state.pop(name)
    with pytest.raises(ValueError, match=f"weights lack {name}"):
        load_state(model, state)
    assert state_bytes(model) == before


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3"])
def test_a_run_with_adapters_ends_in_a_folder_that_others_load(name: str, tmp_path: Path) -> None:
    """`final` of a mixture of experts with adapters has the checkpoint's names and the adapted weights."""
    Policy(family(name), tiny_tokenizer(), "base")
    save_policy(Policy(family(name), tiny_tokenizer(), "base"), tmp_path / "base")
    policy = load_policy(tmp_path / "base", PolicyConfig(lora=LoraConfig(rank=2, targets=("o_proj",))))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    save_policy(policy, tmp_path / "final")
    found, base = (
        safetensors.torch.load_file(tmp_path / folder / "model.safetensors") for folder in ("final", "base")
    )
    assert found.keys() == base.keys()
    assert {n for n, t in base.items() if not torch.equal(t, found[n])} == {n for n in base if "o_proj" in n}
    torch.testing.assert_close(
        load_policy(tmp_path / "final").hidden(IDS), policy.hidden(IDS), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("target", ["down_proj", "gate", "gate_up_proj", "up_proj"])
def test_adapters_keep_away_from_experts_and_routers(name: str, target: str) -> None:
    """Experts are no linear layers and shared ones have their names: refused, with the layers that can be adapted."""
    config = PolicyConfig(lora=LoraConfig(rank=2, targets=("o_proj", target)))
    with pytest.raises(ConfigError, match=rf"policy.lora.targets has '{target}'.*o_proj"):
        Policy(family(name), tiny_tokenizer(), "moe", config)


def test_default_targets_of_a_mixture_say_what_to_set() -> None:
    """The default names the projections of dense layers."""
    with pytest.raises(ConfigError, match=r'targets = \["k_proj", "o_proj", "q_proj", "v_proj"\]'):
        Policy(family("Qwen2Moe"), tiny_tokenizer(), "moe", PolicyConfig(lora=LoraConfig(rank=2)))


def test_dense_weights_are_published_as_they_lie() -> None:
    """Names and memory of a dense model are its own."""
    model = tiny_model("llama")
    own = dict(model.named_parameters())
    found = state_of(model)
    assert found.keys() == own.keys()
    assert all(found[n].data_ptr() == p.data_ptr() for n, p in own.items())
