"""Adapters: what trains, what is published, what the reference is, and what other programs read of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy, load_reference
from mgrpo.model.policy import Policy, save_adapter, save_policy, state_of, trained_state
from mgrpo.model.policy_files import policy_files, policy_from_files
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trainers.torch.learner import Learner, logprobs_of
from tests.models import (
    VOCAB,
    load_state,
    load_state_bytes,
    load_trained_state,
    move_adapters,
    state_bytes,
    tiny_model,
    tiny_tokenizer,
)

RANK, ALPHA = 3, 12.0
LORA = PolicyConfig(lora=LoraConfig(rank=RANK, alpha=ALPHA))
IDS = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("one_thread")


def adapted(config: PolicyConfig = LORA, moved: bool = True) -> Policy:
    """A tiny Llama with adapters, which have moved away from their start."""
    policy = Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", config)
    if moved:
        move_adapters(policy)
    return policy


def micro_batch(rows: int = 4, width: int = 12) -> MicroBatch:
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, width + 1, (rows,), generator=g)
    mask = torch.rand(rows, width, generator=g) < 0.6
    mask[:, 0], mask[:, 2] = False, True
    mask &= torch.arange(width) < lengths[:, None]
    return MicroBatch(
        ids=torch.randint(VOCAB, (rows, width), generator=g),
        loss_mask=mask,
        rollout_logprobs=-5 * torch.rand(rows, width, generator=g),
        lengths=lengths,
        advantages=torch.randn(rows, generator=g),
        weights=torch.ones(rows),
    )


def test_only_adapters_train_and_they_start_at_the_base() -> None:
    """A fresh adapter changes nothing, is the same in every process, and is all that an optimizer gets."""
    base, policy, again = (
        Policy(tiny_model("llama"), tiny_tokenizer()),
        adapted(moved=False),
        adapted(moved=False),
    )
    assert torch.equal(policy.hidden(IDS), base.hidden(IDS))
    trained = {n: p.detach() for n, p in policy.model.named_parameters()}
    names = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert all(".lora_A." in n or ".lora_B." in n for n in names)
    assert sum(p.numel() for p in policy.parameters()) == sum(
        RANK * (w.shape[0] + w.shape[1])
        for n, w in base.model.named_parameters()
        if n.endswith("_proj.weight")
    )
    for name in names:
        if ".lora_A." in name:
            bound = trained[name].shape[1] ** -0.5
            assert float(trained[name].abs().max()) <= bound < 4 * float(trained[name].std())
            assert torch.equal(trained[name], again.model.get_parameter(name))
    assert len({float(trained[n].flatten()[0]) for n in names if ".lora_A." in n}) == 14


def test_published_weights_are_the_formulas_and_need_no_adapters(tmp_path: Path) -> None:
    """W + alpha / rank B A under the plain names, as bytes, as a folder and through a shell; outputs agree."""
    policy = adapted()
    plain = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in state_of(plain).items()}
    own = dict(policy.model.named_parameters())
    published = state_of(policy.model)
    assert published.keys() == before.keys()
    changed = 0
    for name, tensor in published.items():
        layer = name.removesuffix(".weight")
        expected = before[name]
        if f"{layer}.lora_A.default.weight" in own:
            a, b = (own[f"{layer}.lora_{x}.default.weight"].detach().double() for x in "AB")
            expected = (expected.double() + ALPHA / RANK * b @ a).float()
            changed += 1
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    assert changed == 14
    load_state_bytes(plain, state_bytes(policy.model))
    expected = policy.hidden(IDS) @ policy.head_weight.T
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    save_policy(policy, tmp_path / "p")
    folder = load_policy(tmp_path / "p")
    assert all(torch.equal(t, published[n]) for n, t in state_of(folder.model).items())
    files = policy_files(policy)
    assert not [n for n in files if "adapter" in n or b"lora" in files[n]]
    shell = policy_from_files(files, "main")
    load_state_bytes(shell.model, state_bytes(policy.model))
    assert torch.equal(shell.hidden(IDS), folder.hidden(IDS))


def test_the_adapter_alone_is_what_peft_reads(tmp_path: Path) -> None:
    """peft puts the saved adapter onto the base model and computes what the policy computes."""
    from peft import PeftModel

    policy = adapted()
    save_adapter(policy, tmp_path / "a")
    assert sorted(f.name for f in (tmp_path / "a").iterdir() if f.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["inference_mode"]) == (RANK, ALPHA, True)
    assert said["base_model_name_or_path"] == "tiny"
    names = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight" in names
    with warnings.catch_warnings():  # peft asks transformers for something by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        theirs = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "a"))
    expected = policy.hidden(IDS) @ policy.head_weight.T
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"has no adapters to save: policy.lora.rank is 0"):
        save_adapter(Policy(tiny_model("llama"), tiny_tokenizer()), tmp_path / "b")


def test_the_base_is_the_reference_without_a_second_model(tmp_path: Path) -> None:
    """With adapters the KL term's reference shares every weight with the policy, and equals the starting model; its
    forward in mid-step leaves the policy's gradient what it is with a reference of its own."""
    save_policy(Policy(tiny_model("llama"), tiny_tokenizer()), tmp_path / "start")
    loss = GrpoLossConfig(kl_coef=0.3)
    batch = micro_batch()
    results: list[list[Tensor]] = []
    for own in (False, True):
        policy = adapted()
        start = load_policy(tmp_path / "start")
        reference = start if own else load_reference(policy, tmp_path / "nowhere")
        assert (reference.model is policy.model) is not own
        seen = logprobs_of(reference, batch, 1.0)
        torch.testing.assert_close(seen, logprobs_of(start, batch, 1.0), rtol=1e-6, atol=1e-6)
        assert (seen - logprobs_of(policy, batch, 1.0)).abs().max() > 0.1
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        learner = Learner(policy, optimizer, loss, 1e9, reference)
        metrics = learner.step(MiniBatch([batch], 4.0))
        assert metrics["kl"] > 0.01
        results.append([p.grad for p in policy.parameters() if p.grad is not None])
    assert len(results[0]) == 28
    for shared, separate in zip(*results, strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="has no adapters, so it is not its own reference"):
        Policy(tiny_model("llama"), tiny_tokenizer()).base()


def test_a_reference_of_its_own_is_computed_as_the_policy_is(tmp_path: Path) -> None:
    """Without adapters the reference is loaded from the folder, frozen, with the policy's attention and precision."""
    save_policy(Policy(tiny_model("llama"), tiny_tokenizer()), tmp_path / "start")
    config = PolicyConfig(dtype="bfloat16", attention="varlen", last_layers=1, gradient_checkpointing=True)
    policy = load_policy(tmp_path / "start", config)
    reference = load_reference(policy, tmp_path / "start")
    assert (reference.attention, reference.config.dtype) == ("varlen", "bfloat16")
    assert not list(reference.parameters())
    assert torch.equal(logprobs_of(reference, micro_batch(), 1.0), logprobs_of(policy, micro_batch(), 1.0))


def test_a_checkpoint_holds_the_adapters_and_restores_them() -> None:
    """trained_state is A and B alone; loading it into a fresh policy restores every bit; merged weights cannot be
    taken apart again and say so."""
    policy, fresh = adapted(), adapted(moved=False)
    state = {name: tensor.clone() for name, tensor in trained_state(policy.model).items()}
    assert len(state) == 28
    load_trained_state(fresh.model, state)
    assert torch.equal(fresh.hidden(IDS), policy.hidden(IDS))
    assert state_bytes(fresh.model) == state_bytes(policy.model)
    with pytest.raises(ValueError, match=r"weights lack .*lora_A"):
        load_trained_state(fresh.model, {k: v for k, v in state.items() if "layers.0.mlp.up" not in k})
    with pytest.raises(ValueError, match="merged weights do not say what of them is adapter"):
        load_state(fresh.model, state_of(policy.model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn(dtype: str) -> None:
    """A few steps raise the probability of what had an advantage; the frozen weights keep every bit."""
    config = PolicyConfig(dtype=dtype, lora=LoraConfig(rank=RANK, alpha=ALPHA))
    policy = Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", config)
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    batch = micro_batch()
    batch.advantages = batch.advantages.abs() + 0.5
    batch.rollout_logprobs[:, 1:][batch.active().mask] = before = logprobs_of(policy, batch, 1.0)
    learner = Learner(policy, torch.optim.AdamW(policy.parameters(), lr=0.02), GrpoLossConfig(), 1.0)
    for _ in range(5):
        learner.step(MiniBatch([batch], 4.0))
    assert (logprobs_of(policy, batch, 1.0) - before).mean() > 0.05
    for name, tensor in frozen.items():
        assert torch.equal(policy.model.get_parameter(name), tensor)


def test_frozen_matrices_in_half_precision_are_what_is_published() -> None:
    """With bfloat16 the base's matrices take half the memory, and published weights are the ones that were trained
    with: rounded base plus adapters in float32."""
    config = PolicyConfig(dtype="bfloat16", lora=LoraConfig(rank=RANK, alpha=ALPHA))
    policy = adapted(config)
    exact = tiny_model("llama").get_parameter("model.layers.0.mlp.up_proj.weight")
    layer = policy.model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base_layer.weight, exact.bfloat16())
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    assert a.dtype == b.dtype == torch.float32
    published = state_of(policy.model)["model.layers.0.mlp.up_proj.weight"]
    assert published.dtype == torch.float32
    torch.testing.assert_close(
        published, exact.bfloat16().float() + ALPHA / RANK * b @ a, rtol=1e-6, atol=1e-6
    )


def test_targets_that_are_not_there_are_named() -> None:
    """Our own decoder has other matrices: the error lists them, and naming them works."""
    with pytest.raises(
        ConfigError,
        match=r"shift: policy.lora.targets has 'q_proj'; the linear layers of ShiftDecoderForCausalLM are "
        "down_proj, out_proj, qk_proj, up_proj, v_proj",
    ):
        Policy(tiny_model("shift"), tiny_tokenizer(), "shift", LORA)
    named = PolicyConfig(lora=LoraConfig(rank=2, targets=("up_proj", "down_proj")))
    policy = Policy(tiny_model("shift"), tiny_tokenizer(), "shift", named)
    assert len(list(policy.parameters())) == 8
    assert state_of(policy.model).keys() == state_of(tiny_model("shift")).keys()
