"""What a rank sends of a model: parts of its own parameters where it can, and never more gathered than must be."""

from __future__ import annotations

import pytest
import torch

from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.model.policy import Policy, state_of
from mgrpo.trainers.torch.direct_parts import Parts
from mgrpo.trainers.torch.ranks import Ranks
from tests.families import family
from tests.models import tiny_model, tiny_tokenizer


def parts_of(policy: Policy) -> Parts:
    return Parts(policy.model, torch.bfloat16, Ranks())


@pytest.mark.parametrize("name", ["shift", "llama", "Qwen2", "Qwen3Moe", "Mixtral"])
def test_models_are_sent_from_where_they_lie(name: str) -> None:
    """Tied or not, with fused experts: names, shapes and values are those of a checkpoint, and every tensor lies in a
    parameter's own memory: nothing is gathered or copied."""
    model = tiny_model(name) if name in ("shift", "llama") else family(name)  # type: ignore[arg-type]
    parts, state = parts_of(Policy(model, tiny_tokenizer(), name)), state_of(model)
    memory = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    assert {t.name for t in parts.tensors} == set(state)
    for number, tensor in enumerate(parts.tensors):
        whole, held = state[tensor.name], parts.held(number)
        assert tensor.shape == tuple(whole.shape) and tensor.ends == (whole.numel(),)
        assert tensor.dtype == ("bfloat16" if whole.is_floating_point() else str(whole.dtype)[6:])
        assert torch.equal(held, whole.detach().reshape(-1))
        assert held.untyped_storage().data_ptr() in memory


def test_merged_adapters_are_made_when_they_are_sent_and_dropped_then() -> None:
    """One module's adapters at a time; what has no adapter is sent from where it lies."""
    policy = Policy(
        tiny_model("llama"), tiny_tokenizer(), "lora", PolicyConfig(lora=LoraConfig(rank=4, alpha=8))
    )
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    parts, state = parts_of(policy), state_of(policy.model)
    adapted = [i for i, t in enumerate(parts.tensors) if "_proj" in t.name]
    assert len(adapted) == 14
    for number, tensor in enumerate(parts.tensors):
        parts.prepare([number])
        assert torch.equal(parts.held(number).view(tensor.shape), state[tensor.name].detach())
        assert len(parts._converted) == (number in adapted)
    parts.prepare(())
    assert not parts._converted


def test_a_version_is_what_the_weights_are_then() -> None:
    """After a step, refresh() brings what was merged up to date; parameters are sent from where they are anyway."""
    policy = Policy(
        tiny_model("llama"), tiny_tokenizer(), "lora", PolicyConfig(lora=LoraConfig(rank=4, alpha=8))
    )
    parts = parts_of(policy)
    number = next(i for i, t in enumerate(parts.tensors) if "q_proj" in t.name)
    parts.prepare([number])
    before = parts.held(number).clone()
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    parts.refresh()
    parts.prepare([number])
    assert not torch.equal(parts.held(number), before)
    assert torch.equal(
        parts.held(number), state_of(policy.model)[parts.tensors[number].name].detach().reshape(-1)
    )
