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

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.groups import width_groups
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import FORWARD_COST, Policy, save_policy, state_of, trained_state
from mgrpo.trainers.batch import MiniBatch
from mgrpo.trainers.torch.learner import Learner
from tests.models import (
    VOCAB,
    load_state_bytes,
    load_trained_state,
    state_bytes,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from tests.rows import ROWS, rows_of
from tests.test_learner import denominator_of, relative

IDS = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("one_thread")


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
    save_policy(tiny_policy(), tmp_path / "short")
    weights = tmp_path / "short" / "model.safetensors"
    state = safetensors.torch.load(weights.read_bytes())
    name = min(n for n in state if n.endswith("norm.weight"))
    safetensors.torch.save_file(state | {name: torch.ones(7)}, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"short: {name} has shape \(7,\), config.json says \(32,\)"):
        load_policy(tmp_path / "short")
    del state[name]
    safetensors.torch.save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"short: its weights lack {name} \(1 tensors are missing\)"):
        load_policy(tmp_path / "short")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(ConfigError, match=r"bare: no causal language model"):
        load_policy(tmp_path / "bare")


def test_an_architecture_of_a_task_is_registered_when_a_folder_needs_it(tmp_path: Path) -> None:
    """A process that has never imported the demo's decoder loads its folder, and its shell; no other is imported."""
    save_policy(tiny_policy("shift"), tmp_path / "shift")
    save_policy(tiny_policy("llama"), tmp_path / "llama")
    code = (
        "import sys\nfrom mgrpo.model.loading import load_policy\n"
        "from mgrpo.model.policy_files import policy_from_files, policy_files, tokenizer_from_files\n"
        "load_policy(sys.argv[1] + '/llama')\nassert not any('atlas' in m for m in sys.modules)\n"
        "files = policy_files(load_policy(sys.argv[1] + '/shift'))\n"
        "for name in [m for m in sys.modules if 'atlas' in m]: del sys.modules[name]\n"
        "print(type(policy_from_files(files, 'x').model).__name__, tokenizer_from_files(files, 'x')[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.split() == ["ShiftDecoderForCausalLM", str(VOCAB)], done.stderr


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
    with pytest.raises(
        ConfigError, match=f"tokenizer has 200 tokens up to id 199, the model's head {VOCAB} rows"
    ):
        Policy(tiny_model("shift"), tiny_tokenizer(200))


def test_importing_the_package_loads_no_transformers():
    """Neither mgrpo nor mgrpo.model.policy imports transformers."""
    code = "import sys, mgrpo, mgrpo.model.policy; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0


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


def llama(**settings: object) -> Policy:
    return Policy(tiny_model("llama"), tiny_tokenizer(), "tiny", PolicyConfig(**settings))


def step_gradient(policy: Policy, cuts: list[list[int]], loss: GrpoLossConfig) -> list[torch.Tensor]:
    """What Learner.step hands to the optimizer for test_learner's rows, cut into micro-batches."""
    rows = rows_of(1)
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in policy.parameters() if p.grad is not None)
    )
    micro = [rows.rows(torch.isin(torch.arange(ROWS), torch.tensor(cut))) for cut in cuts]
    Learner(policy, optimizer, loss, grad_clip=1e9).step(MiniBatch(micro, denominator_of(rows, loss)))
    return seen


WHOLE, TWO = [list(range(ROWS))], [list(range(3)), list(range(3, ROWS))]
FIVE = [[0], [1, 9], [2, 3, 4], [5, 8], [6, 7]]
HELD = {
    "rows": {},
    "varlen": {"attention": "varlen"},
    "adapters": {"attention": "varlen", "lora": LoraConfig(rank=3)},
    "last layer, recomputed": {"attention": "sdpa", "last_layers": 1, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches_do_not_change_a_language_models_gradient(held: str, loss_type: str):
    """One, two and five micro-batches: the same gradient to 1e-6, however the policy is held."""
    policy, loss = llama(**HELD[held]), GrpoLossConfig(type=loss_type)
    whole = step_gradient(policy, WHOLE, loss)
    assert len(whole) == len(list(policy.parameters()))
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for cuts in (TWO, FIVE):
        assert relative(step_gradient(policy, cuts, loss), whole) < 1e-6


@pytest.mark.parametrize(("kind", "attention"), [("shift", "rows"), ("llama", "rows"), ("llama", "varlen")])
def test_recomputing_layers_changes_no_bit(kind: str, attention: str):
    """Gradients with checkpointing are equal bit for bit, and each trained layer does run twice."""
    loss, gradients, runs = GrpoLossConfig(), [], []
    for again in (False, True):
        config = PolicyConfig(attention=attention, gradient_checkpointing=again)
        policy = Policy(tiny_model(kind), tiny_tokenizer(), kind, config)
        block = policy.layers[0].mlp_norm if kind == "shift" else policy.layers[0].mlp
        count: list[int] = []
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        gradients.append(step_gradient(policy, WHOLE, loss))
        runs.append(len(count))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert runs[1] == 2 * runs[0] > 0


def test_bfloat16_computes_coarsely_and_trains_float32_weights():
    """Hidden states are near those of float32 but not equal; what trains is float32, and an update far below bfloat16's
    spacing still arrives."""
    exact, half = llama(), llama(dtype="bfloat16", attention="varlen")
    with torch.no_grad():
        difference = (half.hidden(IDS) - exact.hidden(IDS)).abs().max()
    assert 1e-4 < float(difference) < 0.2
    assert (half.hidden(IDS).dtype, half.head_weight.dtype) == (torch.bfloat16, torch.float32)
    found, expected = (step_gradient(p, WHOLE, GrpoLossConfig()) for p in (half, exact))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98
    before = [p.detach().clone() for p in half.parameters()]
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-6, weight_decay=0.0)
    for parameter, gradient in zip(half.parameters(), found, strict=True):
        parameter.grad = gradient
    optimizer.step()
    moved = [float((p.detach() != b).float().mean()) for p, b in zip(half.parameters(), before, strict=True)]
    assert min(moved[1:]) > 0.9  # the embedding moves where a token occurs
    assert (
        max(
            float((p.detach().bfloat16() != b.bfloat16()).float().mean())
            for p, b in zip(half.parameters(), before, strict=True)
        )
        < 0.05
    )  # pure bfloat16 weights would have lost it


def test_only_the_last_layers_train():
    """The last n decoder layers and the final norm get gradients and are all a checkpoint holds; the rest is frozen."""
    policy = llama(last_layers=1)
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in policy.model.named_parameters() if ".layers.1." in n or n == "model.norm.weight"
    }
    assert len(trained) == 10
    gradients = step_gradient(policy, WHOLE, GrpoLossConfig())
    reference = dict(
        zip(
            [n for n, _ in llama().model.named_parameters()],
            step_gradient(llama(), WHOLE, GrpoLossConfig()),
            strict=True,
        )
    )
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, reference[name], rtol=1e-5, atol=1e-8)
    state = trained_state(policy.model)
    assert state.keys() == trained
    moved = {name: tensor + 1.0 for name, tensor in state.items()}
    load_trained_state(policy.model, moved)
    assert all(torch.equal(policy.model.get_parameter(n), t) for n, t in moved.items())
    with pytest.raises(ValueError, match=r"weights lack model.norm.weight \(1 of 10"):
        load_trained_state(policy.model, {n: t for n, t in moved.items() if "layers" in n})
    shift = Policy(tiny_model("shift"), tiny_tokenizer(), "shift", PolicyConfig(last_layers=1))
    assert {n.split(".")[1] for n, p in shift.model.named_parameters() if p.requires_grad} == {
        "layers",
        "norm",
    }
    with pytest.raises(ConfigError, match=r"tiny: policy.last_layers=3 exceeds its 2 decoder layers"):
        llama(last_layers=3)


def test_settings_that_this_machine_or_these_settings_cannot_meet(tmp_path: Path, monkeypatch):
    """A GPU where there is none, peft where it is not installed: one line that says so, before anything is loaded."""
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r'policy.device is "cuda", but torch .* sees no GPU'):
            load_policy(tmp_path / "nowhere", PolicyConfig(device="cuda"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r'policy.lora.rank=2 needs the package peft \(pip install "mgrpo\[lora\]"'
    ):
        llama(lora=LoraConfig(rank=2))
    for bad, message in (
        ({"activation_offload": True}, 'activation_offload has no effect with device "cpu"'),
        ({"attention": "flash"}, 'attention "flash" needs device "cuda"'),
        ({"lora": LoraConfig(rank=2), "last_layers": 1}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyConfig(**bad)


def test_offloaded_activations_come_back(monkeypatch):
    """What the backward pass needs passes through main memory and changes nothing. Only a GPU gains by it, so the
    setting is refused on a CPU; here the mechanism is switched on by hand."""
    plain, offloaded = llama(), llama()
    offloaded._offload = True
    kept: list[int] = []
    real = torch.autograd.graph.save_on_cpu

    class Counted(real):
        def __init__(self, pin_memory: bool) -> None:
            kept.append(pin_memory)
            super().__init__(pin_memory=False)  # nothing to pin without a GPU

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    loss = GrpoLossConfig()
    found, expected = step_gradient(offloaded, WHOLE, loss), step_gradient(plain, WHOLE, loss)
    assert kept == [True]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_the_vocabulary_never_exists_for_all_tokens():
    """The peak memory of a training step with SmolLM2's vocabulary stays within 1.15 of that of the same step without
    head and loss, in the shape that hides the head least: two layers, recomputed (whole logits: 1.6 times)."""
    peaks = []
    for kind in ("none", "fused"):
        command = [sys.executable, "-m", "bench.bench_head_memory", "--child", kind, "--recompute"]
        command += ["--tokens", "2048", "--layers", "2"]
        done = subprocess.run(
            command, cwd=Path(__file__).parent.parent, timeout=600, check=True, capture_output=True, text=True
        )
        peaks.append(float(done.stdout))
    assert 0.7 < peaks[0] <= peaks[1] * 1.05  # GB: weights, gradients and optimizer state alone are 0.57
    assert peaks[1] < 1.15 * peaks[0]
