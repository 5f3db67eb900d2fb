"""What computes in bfloat16: copies of float32 masters, the same numbers as a bfloat16 model, gradients in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.model.policy import Policy, save_policy, state_of
from mgrpo.model.precision import float32_modules, fsdp_policy, kept_in_half
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.learner import Learner, adamw_way, logprobs_of
from mgrpo.trainers.torch.sft import demo_loss
from tests.models import VOCAB, tiny_model, tiny_tokenizer
from tests.rows import rows_of
from tests.test_policy import IDS

pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(model: Any = None, **settings: Any) -> Policy:
    settings = {"dtype": "bfloat16", "attention": "sdpa"} | settings
    return Policy(model or tiny_model("llama"), tiny_tokenizer(), "tiny", PolicyConfig(**settings))


def moe(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def cast_to_half(model: Any) -> Any:
    """As from_pretrained(dtype=bfloat16) has it: rotations stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def hidden_of(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.hidden(IDS)


@pytest.mark.parametrize(
    "make", [lambda: tiny_model("llama"), lambda: tiny_model("shift"), moe], ids=["llama", "shift", "moe"]
)
def test_hidden_states_are_those_of_a_bfloat16_model(make: Any) -> None:
    """To the bit what the model gives whose weights were cast, as a server in bfloat16 holds them; the masters stay."""
    policy, cast = policy_of(make()), cast_to_half(make())
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    with torch.no_grad():
        expected = policy.backbone.__class__.forward(cast.base_model, input_ids=IDS, use_cache=False)
    found = hidden_of(policy)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.last_hidden_state)
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_a_bfloat16_model_added_up_in_float32(again: bool) -> None:
    """Two micro-batches: each gradient is the bfloat16 model's, the sum has more bits than bfloat16 has."""
    policy, cast = policy_of(gradient_checkpointing=again), cast_to_half(tiny_model("llama"))
    sums: dict[str, torch.Tensor] = {}
    for part in (IDS[:1], IDS[1:]):
        policy.hidden(part).float().square().sum().backward()
        cast.zero_grad()
        cast.model(input_ids=part, use_cache=False).last_hidden_state.float().square().sum().backward()
        for name, parameter in cast.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.float()
    finer = 0
    for name, parameter in policy.model.named_parameters():
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            continue
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, sums[name], rtol=0, atol=0, msg=name)
        finer += int((parameter.grad != parameter.grad.bfloat16()).sum())
    assert finer > 0
    table = policy.model.get_parameter("model.embed_tokens.weight").grad
    torch.testing.assert_close(table, sums["model.embed_tokens.weight"], rtol=2e-2, atol=1e-3)


def test_a_copy_is_made_once_a_step() -> None:
    """Many forwards, one rounding of each parameter; after an update, whoever makes it, another one."""
    policy = policy_of()
    before = hidden_of(policy)
    copies = [copy for *_, copy in policy.precision._copies.values()]
    with torch.inference_mode():
        policy.hidden(IDS)
    policy.hidden(IDS).float().sum().backward()
    assert len(copies) == 19  # 2 layers of 9, the final norm; neither table nor head
    assert all(a is b for a, (*_, b) in zip(copies, policy.precision._copies.values(), strict=True))
    for foreach in ({"foreach": True}, {"fused": True}):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, **foreach)
        optimizer.step()
        after = hidden_of(policy)
        assert not torch.equal(after, before)
        before = after
    with torch.no_grad():
        policy.model.get_parameter("model.norm.weight").copy_(torch.full((32,), 3.0))
    assert not torch.equal(hidden_of(policy), before)


def test_an_exception_leaves_the_masters_in_place() -> None:
    """Whatever ends a forward, and the recomputation that stops early, the parameters are the optimizer's again."""
    policy = policy_of(gradient_checkpointing=True)
    held = [id(p) for p in policy.model.parameters()]
    policy.hidden(IDS).float().sum().backward()
    with pytest.raises((IndexError, RuntimeError)):
        policy.hidden(IDS + VOCAB)
    assert [id(p) for p in policy.model.parameters()] == held
    assert all(isinstance(p, torch.nn.Parameter) for p in policy.model.parameters())


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"lora": LoraConfig(rank=2, targets=("q_proj", "v_proj"))}, set()),
        ({"last_layers": 1}, set()),
        ({"last_layers": 1, "head_dtype": "float32"}, {"lm_head.weight"}),
    ],
    ids=str,
)
def test_what_is_frozen_is_kept_in_half(settings: dict[str, Any], exact: set[str]) -> None:
    """Matrices, the table and fused experts are bfloat16; vectors, what trains and an exact head are float32."""
    policy = policy_of(moe(), **settings)
    for name, parameter in policy.model.named_parameters():
        half = parameter.dim() > 1 and not parameter.requires_grad and name not in exact
        assert parameter.dtype == (torch.bfloat16 if half else torch.float32), name
    halves = {n for n, p in policy.model.named_parameters() if p.dtype == torch.bfloat16}
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.embed_tokens.weight"} <= halves
    bytes_of = sum(p.nbytes for p in policy.model.parameters() if not p.requires_grad)
    count = sum(p.numel() for p in policy.model.parameters() if not p.requires_grad)
    assert bytes_of < 2.1 * count if not exact else bytes_of < 4 * count
    assert torch.equal(hidden_of(policy), hidden_of(policy_of(moe())))
    assert kept_in_half(policy.model, PolicyConfig()) == []


def test_a_frozen_reference_is_kept_in_half() -> None:
    """freeze() leaves nothing to train, half the memory and the same numbers."""
    policy = policy_of()
    before = hidden_of(policy)
    policy.freeze()
    assert not list(policy.parameters()) and torch.equal(hidden_of(policy), before)
    assert {p.dtype for p in policy.model.parameters() if p.dim() > 1} == {torch.bfloat16}


class Stubborn(LlamaForCausalLM):  # type: ignore[misc]
    """An architecture that keeps a matrix in float32, and multiplies in it."""

    _keep_in_fp32_modules_strict = ("gate_proj",)


def test_what_an_architecture_keeps_in_float32_stays_so() -> None:
    """Frozen or not; and FSDP2 gets it as units of their own."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = Stubborn(config)
    for layer in model.model.layers:
        gate = layer.mlp.gate_proj
        gate.forward = lambda x, gate=gate: torch.nn.functional.linear(x.float(), gate.weight).to(x.dtype)
    assert float32_modules(model) == [layer.mlp.gate_proj for layer in model.model.layers]
    policy = policy_of(model, last_layers=1)
    policy.hidden(IDS).float().sum().backward()
    assert {p.dtype for m in float32_modules(model) for p in m.parameters()} == {torch.float32}


def test_the_policy_for_fsdp_gathers_bfloat16_and_sums_float32() -> None:
    """Nothing is set in float32, so that those numbers stay what they are."""
    half, plain = fsdp_policy(PolicyConfig(dtype="bfloat16")), fsdp_policy(PolicyConfig())
    assert (half.param_dtype, half.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert (plain.param_dtype, plain.reduce_dtype) == (None, None)


def test_the_head_follows_or_stays_float32() -> None:
    """Hidden states come in what the head multiplies; a training step, log-probs and SFT work with each, and the
    float32 head is nearer to a head in float64."""
    batch, off = rows_of(1), []
    for head, dtype in (("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        policy = policy_of(head_dtype=head)
        hidden = hidden_of(policy)
        assert hidden.dtype == dtype
        found = logprobs_of(policy, batch, 1.0)
        active = batch.active()
        with torch.no_grad():
            states = policy.hidden_before(batch.ids, batch.lengths, active.mask).double()
            logits = states @ policy.token_head.double().T
        exact = logits.log_softmax(-1).gather(1, active.targets[:, None])[:, 0]
        off.append(float((found - exact).abs().mean()))
        learner = Learner(policy, torch.optim.AdamW(policy.parameters()), GrpoLossConfig(), 1.0)
        assert learner.step(MiniBatch([batch], 4.0))["grad_norm"] > 0
        assert policy.head_weight.grad is not None and policy.head_weight.grad.dtype == torch.float32
        demo_loss(policy, [([1, 2, 3, 4], [0, 0, 1, 1])]).backward()
    assert off[0] == off[2] > 10 * off[1]


def test_a_saved_policy_names_its_widest_dtype(tmp_path: Any) -> None:
    """A reader that goes by config.json must not round what was trained."""
    policy = policy_of(last_layers=1)
    save_policy(policy, tmp_path / "out")
    assert '"dtype": "float32"' in (tmp_path / "out" / "config.json").read_text()
    assert {t.dtype for t in state_of(policy.model).values()} == {torch.float32, torch.bfloat16}


def test_adamw_is_fused_on_a_gpu_alone() -> None:
    """On a CPU the steps are those of foreach to the bit."""
    assert adamw_way(torch.device("cuda", 0)) == {"fused": True}
    assert adamw_way(torch.device("cpu")) == {"foreach": True}
