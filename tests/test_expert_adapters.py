"""Adapters on fused experts: what is trained with is what is published, and other programs read it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo.config import load_config
from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, MeshConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy, save_adapter, save_policy, state_of, trained_state
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from tests.families import family
from tests.models import (
    load_state,
    load_trained_state,
    move_adapters,
    state_bytes,
    tiny_model,
    tiny_tokenizer,
)
from tests.moe_ranks import CUTS, cut, step
from tests.rows import rows_of
from tests.runs import RELAY
from tests.test_lora import micro_batch

RANK, ALPHA = 3, 12.0
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.randint(101, (3, 9), generator=torch.Generator().manual_seed(1))
ATTENTION = {"DeepseekV3": ("q_a_proj", "o_proj")}
FAMILIES = ("Qwen3Moe", "Qwen2Moe", "GptOss", "Mixtral", "DeepseekV3")

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(*targets: str, **more: Any) -> PolicyConfig:
    return PolicyConfig(lora=LoraConfig(rank=RANK, alpha=ALPHA, targets=targets), **more)


def plain(name: str) -> Any:
    return family(name, initializer_range=0.2)


def adapted(name: str, config: PolicyConfig, moved: bool = True) -> Policy:
    """A tiny model with adapters, which have moved away from their start."""
    policy = Policy(plain(name), tiny_tokenizer(100), "tiny", config)
    if moved:
        move_adapters(policy)
    return policy


def expected_experts(name: str, policy: Policy, parameter: str) -> Tensor:
    """W + alpha / rank B A of each expert of the last layer, in float64, from what peft holds."""
    wrapper = policy.model.get_submodule("model.layers.1.mlp.experts")
    while wrapper.parameter_name != parameter:
        wrapper = wrapper.base_layer
    a, b = (getattr(wrapper, f"lora_{x}").default.weight.detach().double() for x in "AB")
    weight = plain(name).get_parameter(f"model.layers.1.mlp.experts.{parameter}").detach().double()
    experts = len(weight)
    for e in range(experts):
        change = ALPHA / RANK * b[:, e::experts] @ a[e * RANK : (e + 1) * RANK]
        weight[e] += change if change.shape == weight[e].shape and name != "GptOss" else change.T
    return weight


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_published_weights_are_the_formulas(name: str, targets: tuple[str, ...]) -> None:
    """Names and layout are those of a checkpoint without adapters; loaded into a plain model, they are W + alpha / rank
    B A expert by expert, and it computes what the policy computes."""
    policy = adapted(name, config_of(*ATTENTION.get(name, ("q_proj", "o_proj")), *targets))
    published = state_of(policy.model)
    assert {n: t.shape for n, t in published.items()} == {
        n: t.shape for n, t in state_of(plain(name)).items()
    }
    model = plain(name)
    load_state(model, published)
    for parameter in ("gate_up_proj", "down_proj"):
        found = model.get_parameter(f"model.layers.1.mlp.experts.{parameter}").detach()
        start = plain(name).get_parameter(f"model.layers.1.mlp.experts.{parameter}").detach()
        if f"experts.{parameter}" in targets:
            torch.testing.assert_close(
                found, expected_experts(name, policy, parameter).float(), rtol=1e-6, atol=1e-6
            )
            assert (found - start).flatten(1).abs().amax(1).min() > 0.05  # every expert has moved
        else:
            assert torch.equal(found, start)
    hidden = Policy(model, tiny_tokenizer(100), "plain").hidden(IDS)
    torch.testing.assert_close(hidden, policy.hidden(IDS), rtol=1e-4, atol=1e-4)
    assert (hidden - Policy(plain(name), tiny_tokenizer(100), "start").hidden(IDS)).abs().max() > 0.05


def test_gradients_are_those_of_the_merged_weights() -> None:
    """dA = alpha / rank B' dW and dB = alpha / rank dW A' of each expert, dW that of a plain model with merged weights;
    recomputed layers give the same bits, and nothing else has a gradient."""
    rows = cut(rows_of(3, near=True), CUTS[1])
    policy = adapted("Qwen3Moe", config_of(*EXPERTS))
    step(policy, rows)
    merged = plain("Qwen3Moe")
    load_state(merged, state_of(policy.model))
    whole = Policy(merged, tiny_tokenizer(100), "whole")
    step(whole, rows)
    wrapper = policy.model.get_submodule("model.layers.0.mlp.experts")
    for part in (wrapper, wrapper.base_layer):
        dw = merged.get_parameter(f"model.layers.0.mlp.experts.{part.parameter_name}").grad
        a, b = part.lora_A.default.weight, part.lora_B.default.weight
        assert dw is not None and dw.abs().max() > 1e-4
        for e in range(2):
            da, db = a.grad[e * RANK : (e + 1) * RANK], b.grad[:, e::2]
            scale = ALPHA / RANK
            torch.testing.assert_close(da, scale * b.detach()[:, e::2].T @ dw[e], rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(
                db, scale * dw[e] @ a.detach()[e * RANK : (e + 1) * RANK].T, rtol=1e-3, atol=1e-6
            )
    again = adapted("Qwen3Moe", config_of(*EXPERTS, gradient_checkpointing=True))
    kept = step(adapted("Qwen3Moe", config_of(*EXPERTS)), rows)[1]
    assert all(torch.equal(x, y) for x, y in zip(kept, step(again, rows)[1], strict=True))
    assert len(kept) == 2 * 2 * 2  # A and B of two matrices in two layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_experts_learn_and_the_base_stays(dtype: str) -> None:
    """Steps raise the probability of what had an advantage; frozen weights keep every bit; with the adapters off the
    policy is its own reference; a checkpoint holds A and B and restores them."""
    config = config_of(*EXPERTS, dtype=dtype)
    policy = adapted("Qwen3Moe", config, moved=False)
    start = Policy(plain("Qwen3Moe"), tiny_tokenizer(100), "start", PolicyConfig(dtype=dtype))
    batch = micro_batch()
    batch.ids.remainder_(100)
    before = logprobs_of(policy, batch, 1.0)
    bound = 1e-5 if dtype == "float32" else 0.1
    assert (before - logprobs_of(start, batch, 1.0)).abs().max() < bound
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    batch.advantages = batch.advantages.abs() + 0.5
    batch.rollout_logprobs[:, 1:][batch.active().mask] = before
    learner = Learner(policy, torch.optim.AdamW(policy.parameters(), lr=0.02), GrpoLossConfig(), 1.0)
    for _ in range(5):
        learner.step(MiniBatch([batch], 4.0))
    after = logprobs_of(policy, batch, 1.0)
    assert (after - before).mean() > 0.05
    assert all(torch.equal(policy.model.get_parameter(n), t) for n, t in frozen.items())
    assert torch.equal(logprobs_of(policy.base(), batch, 1.0), before)
    state = {name: tensor.clone() for name, tensor in trained_state(policy.model).items()}
    assert len(state) == 8 and all(t.dtype == torch.float32 for t in state.values())
    fresh = adapted("Qwen3Moe", config, moved=False)
    load_trained_state(fresh.model, state)
    assert torch.equal(logprobs_of(fresh, batch, 1.0), after)
    assert state_bytes(fresh.model) == state_bytes(policy.model)


def test_frozen_experts_are_kept_in_half_precision() -> None:
    """With bfloat16 every frozen expert takes two bytes a parameter, adapted or not; what is published is the rounded
    base plus the adapters in float32; in full precision the policy computes that, and leaves no trace."""
    half = adapted("Qwen3Moe", config_of("q_proj", *EXPERTS, dtype="bfloat16"))
    beside = adapted("Qwen3Moe", config_of("q_proj", dtype="bfloat16"))
    for policy in (half, beside):
        frozen = {
            n: p for n, p in policy.model.named_parameters() if not p.requires_grad and ".experts." in n
        }
        assert len(frozen) == 2 * 2 and all(p.dtype == torch.bfloat16 for p in frozen.values())
        assert all(p.dtype == torch.float32 for p in policy.parameters())
    names = set(half.model.state_dict())
    before = half.hidden(IDS)
    merged = plain("Qwen3Moe")
    load_state(merged, state_of(half.model))
    assert merged.get_parameter("model.layers.0.mlp.experts.down_proj").dtype == torch.float32
    exact = Policy(merged, tiny_tokenizer(100), "exact").hidden(IDS)
    with half.full_precision(), torch.no_grad():
        found = half.hidden(IDS)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert 1e-3 < (before.float() - exact).abs().max() < 0.3
    assert torch.equal(half.hidden(IDS), before) and set(half.model.state_dict()) == names


def test_the_folder_is_a_plain_model_and_the_adapter_is_what_peft_reads(tmp_path: Path) -> None:
    """A saved policy has the names of a checkpoint and no adapters; peft puts the adapter alone onto the base."""
    from peft import PeftModel

    policy = adapted("Qwen3Moe", config_of("q_proj", *EXPERTS))
    save_policy(policy, tmp_path / "p")
    assert not [n for n in state_of(policy.model) if "lora" in n or "base_layer" in n]
    folder = load_policy(tmp_path / "p")
    torch.testing.assert_close(folder.hidden(IDS), policy.hidden(IDS), rtol=1e-4, atol=1e-4)
    save_adapter(policy, tmp_path / "a")
    with warnings.catch_warnings():  # peft asks transformers for something by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        theirs = PeftModel.from_pretrained(plain("Qwen3Moe"), str(tmp_path / "a"))
    expected = policy.hidden(IDS) @ policy.head_weight.T
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("Qwen3Moe", "down_proj"),
        ("Qwen3Moe", "experts"),
        ("Qwen3Moe", "gate"),
        ("Qwen3Moe", "experts.gate_proj"),
        ("GptOss", "experts.down_proj_bias"),
        ("DeepseekV3", "shared_experts"),
        ("DeepseekV3", "gate_proj"),
    ],
)
def test_other_parts_of_a_mixture_are_refused(name: str, target: str) -> None:
    """Routers, shared experts, biases and projections that are fused: the error names what there is."""
    with pytest.raises(ConfigError, match=rf"policy\.lora\.targets has '{target}'.*"):
        adapted(name, config_of(target))
    with pytest.raises(
        ConfigError, match=r'fused experts, \["experts\.down_proj", "experts\.gate_up_proj"\]'
    ):
        adapted("Qwen3Moe", PolicyConfig(lora=LoraConfig(rank=1)))
    with pytest.raises(ConfigError, match=r"has 'experts\.down_proj'; the linear layers of Llama"):
        Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", config_of("experts.down_proj"))


@pytest.mark.parametrize(
    "engine",
    ['{type="vllm",sync="lora"}', '{type="hf",adapters=true}'],
)
def test_they_do_not_travel_alone(engine: str) -> None:
    """An engine that takes adapters alone is refused before anything starts, by setting and target."""
    sets = [
        f"agents.main.engine={engine}",
        'agents.main.model="m"',
        "agents.main.sft.steps=0",
        "agents.main.policy.lora.rank=2",
        'agents.main.policy.lora.targets=["q_proj","experts.down_proj"]',
    ]
    with pytest.raises(ConfigError, match=r"cannot carry the adapters of experts, .*'experts\.down_proj'"):
        load_config(RELAY, sets)


def test_they_are_not_spread_over_ranks() -> None:
    """With experts on ranks of their own adapters are for the attention."""
    with pytest.raises(ValueError, match=r"mesh\.ep=2 and lora\.targets with 'experts\.down_proj' exclude"):
        config_of("q_proj", "experts.down_proj", mesh=MeshConfig(dp=2, ep=2))
    config_of("q_proj", mesh=MeshConfig(dp=2, ep=2))
