"""Several policies of one process that are adapters of one base: each samples from its own, and the base is there
once."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mgrpo.addresses import Addresses
from mgrpo.config import RunConfig, load_config
from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.engines.hf import adapters
from mgrpo.engines.hf.adapters import AdaptedPolicy
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.engines.registry import open_engine
from mgrpo.errors import ConfigError, CorruptionError, InfrastructureError
from mgrpo.model import lora
from mgrpo.model.loading import load_policy
from mgrpo.model.policy import Policy, save_policy, state_of
from mgrpo.model.policy_files import policy_files
from mgrpo.model.probe import probe, probe_ids
from tests.models import tiny_policy
from tests.runs import RELAY, records, summary, train
from tests.version_kit import moved, versions

pytestmark = pytest.mark.usefixtures("one_thread")
ROLES = ("main", "left", "right")
LORAS = {
    "main": LoraConfig(rank=2, alpha=8.0),
    "left": LoraConfig(rank=5, alpha=4.0, targets=("q_proj", "down_proj")),
    "right": LoraConfig(rank=2, alpha=8.0),
}
PROMPT = [5, 17, 3, 8]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The base model."""
    save_policy(tiny_policy("llama", 3), tmp_path / "base")
    return tmp_path / "base"


def config_of(folder: Path, *sets: str) -> RunConfig:
    """Three roles with adapters of one base, on the engine of main."""
    each = [
        line
        for role, config in LORAS.items()
        for line in (
            f"agents.{role}.model={folder}",
            f"agents.{role}.policy.lora={{rank={config.rank}, alpha={config.alpha}, targets={list(config.targets)}}}",
        )
    ]
    guests = [f'agents.{role}.engine={{shared_with="main"}}' for role in ROLES[1:]]
    return load_config(RELAY, [*each, *guests, "agents.main.engine.adapters=true", *sets])


def trained(folder: Path, role: str, seed: int, dtype: str = "float32") -> Policy:
    """The trainer's policy of a role, some steps later."""
    policy = load_policy(folder, PolicyConfig(lora=LORAS[role], dtype=dtype))  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return policy


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """What its trainer publishes: A and B alone."""
    return {n: t.detach().clone() for n, t in lora.adapter_of(policy.model.state_dict()).items()}


def opened(config: RunConfig, folder: Path, *roles: str) -> dict[str, HfEngine]:
    files, engines = policy_files(load_policy(folder)), {}
    for role in roles or ROLES:
        engine, _ = open_engine(config, role, files, Addresses("", {}), lambda line: None)
        assert isinstance(engine, HfEngine)
        engines[role] = engine
    return engines


def merged_logprobs(policy: Policy, out: Generation, prompt: list[int]) -> Tensor:
    """(n,) log-probs of the tokens by a plain model with the policy's merged weights."""
    plain = tiny_policy("llama")
    plain.model.load_state_dict(state_of(policy.model))
    row = torch.tensor([[*prompt, *out.token_ids.tolist()]])
    with torch.no_grad():
        logits = plain.vocabulary.logits(plain.hidden(row)[0], plain.head_weight)
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]


def off(policy: Policy, out: Generation, prompt: list[int] = PROMPT) -> float:
    """How far, in nats, the reported log-probs are from those of the merged weights."""
    return float((torch.from_numpy(out.logprobs) - merged_logprobs(policy, out, prompt)).abs().max())


def test_each_role_samples_from_its_own_adapter(folder: Path) -> None:
    """Three roles at once, in one loop, with updates by patch in between: every log-prob is that of the role's own
    merged weights, of the version that the token carries, and of no other role's."""
    engines = opened(config_of(folder), folder)
    policies = {role: [trained(folder, role, seed)] for seed, role in enumerate(ROLES)}

    async def play(sent: dict[str, Any]) -> dict[str, Generation]:
        jobs = {
            role: asyncio.create_task(engine.generate(PROMPT, SamplingParams(16), seed=2))
            for role, engine in engines.items()
        }
        while engines["left"]._arrays.count.max() < 6:
            await asyncio.sleep(0)
        later = trained(folder, "left", 77)
        sent["left"].put(adapter_state(later))
        policies["left"].append(later)
        await engines["left"].load(sent["left"].since(1), 2)
        return {role: await job for role, job in jobs.items()}

    with versions(role="main") as a, versions(role="left") as b, versions(role="right") as c:
        sent = {"main": a, "left": b, "right": c}
        for role, engine in engines.items():
            sent[role].put(adapter_state(policies[role][0]))
            asyncio.run(engine.load(sent[role].whole(), 1))
        outs = asyncio.run(asyncio.wait_for(play(sent), 60))
    for role, out in outs.items():
        expected = [1] * 6 + [2] * 10 if role == "left" else [1] * 16
        assert out.versions.tolist() == expected
        for number, policy in enumerate(policies[role], 1):
            given = merged_logprobs(policy, out, PROMPT)
            gap = (torch.from_numpy(out.logprobs) - given).abs()[torch.from_numpy(out.versions == number)]
            assert gap.max() < 1e-5
        for other in ROLES:
            if other != role:
                assert off(policies[other][0], out) > 1e-2


def test_the_base_is_held_once(folder: Path) -> None:
    """Three engines, one model: the memory of all of them is the base and three adapters. It goes with the last one;
    another run's engines of the same role load the folder afresh."""
    config = config_of(folder)
    engines = opened(config, folder)
    models = {id(engine.policy.model) for engine in engines.values()}
    assert len(models) == 1
    bytes_of_base = sum(p.numel() * 4 for p in tiny_policy("llama").model.parameters())
    held: dict[int, int] = {}
    for engine in engines.values():
        policy = engine.policy
        assert isinstance(policy, AdaptedPolicy)
        assert not policy.shares and policy.model.config._attn_implementation == "sdpa"
        for tensor in (*policy.model.parameters(), *policy.adapter._own.values()):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    small = sum(
        config.rank * (p.shape[0] + p.shape[1]) * 4
        for config in LORAS.values()
        for name, p in tiny_policy("llama").model.named_parameters()
        if name.split(".")[-2] in config.targets
    )
    assert sum(held.values()) == bytes_of_base + small
    again = opened(config, folder, "main", "left")
    assert again["main"].policy.model is again["left"].policy.model
    assert id(again["main"].policy.model) not in models
    del engines, again, engine, policy
    gc.collect()
    assert not adapters._bases


def test_agents_of_other_bases_or_precisions_have_their_own(folder: Path, tmp_path: Path) -> None:
    """Without shared_with as well: what decides is the folder and what is computed in."""
    save_policy(tiny_policy("llama", 4), tmp_path / "other")
    sets = (
        "agents.left.engine={adapters=true}",
        f"agents.left.model={tmp_path}/other",
        "agents.right.engine={adapters=true}",
    )
    engines = opened(config_of(folder, *sets), folder)
    assert engines["right"].policy.model is engines["main"].policy.model
    assert engines["left"].policy.model is not engines["main"].policy.model
    mixed = opened(config_of(folder, 'agents.right.engine={adapters=true, dtype="bfloat16"}'), folder)
    assert mixed["right"].policy.model is not mixed["main"].policy.model
    assert mixed["left"].policy.model is mixed["main"].policy.model


def test_an_update_of_one_role_leaves_the_others_to_the_bit(folder: Path) -> None:
    """A whole version, a patch, and one that is refused: other roles' tokens and log-probs stay exactly what they
    were."""
    engines = opened(config_of(folder), folder)
    main, left = trained(folder, "main", 1), trained(folder, "left", 2)

    def ask(role: str) -> Generation:
        return asyncio.run(engines[role].generate(PROMPT, SamplingParams(12), seed=4))

    with versions() as sent, versions(role="left") as other:
        sent.put(adapter_state(main))
        asyncio.run(engines["main"].load(sent.whole(), 1))
        before = ask("main")
        other.put(adapter_state(left))
        asyncio.run(engines["left"].load(other.whole(), 1))
        other.put(moved(adapter_state(left), 1, 0.5))
        asyncio.run(engines["left"].load(other.since(1), 2))
        after = ask("main")
        assert after.token_ids.tolist() == before.token_ids.tolist()
        assert after.logprobs.tolist() == before.logprobs.tolist()
        with pytest.raises(
            CorruptionError, match=r"is a patch of main\.e1\.v1, the engine holds weights without"
        ):
            sent.put(moved(adapter_state(main), 1))
            asyncio.run(engines["right"].load(sent.since(1), 2))
        assert ask("left").versions.tolist() == [2] * 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_rounded_as_the_trainer_rounds_it(folder: Path, dtype: str) -> None:
    """A trainer in bfloat16 multiplies by rounded frozen matrices; so does the engine, in float32 to 1e-5."""
    engines = opened(config_of(folder, f"agents.main.policy.dtype={dtype}"), folder, "main")
    policy = trained(folder, "main", 1, dtype)
    with versions() as sent:
        sent.put(adapter_state(policy))
        asyncio.run(engines["main"].load(sent.whole(), 1))
    out = asyncio.run(engines["main"].generate(PROMPT, SamplingParams(16), seed=2))
    assert off(policy, out) < 1e-5
    other = trained(folder, "main", 1, "bfloat16" if dtype == "float32" else "float32")
    assert off(other, out) > 1e-4


def test_an_engine_in_bfloat16_is_near_the_merged_weights(folder: Path) -> None:
    """Base in bfloat16, adapters in float32, as they arrive."""
    engines = opened(
        config_of(folder, 'agents.main.engine={adapters=true, dtype="bfloat16"}'), folder, "main"
    )
    policy = trained(folder, "main", 1)
    assert config_of(folder).agents["main"].engine.weights_dtype == "float32"
    with versions() as sent:
        sent.put(adapter_state(policy))
        asyncio.run(engines["main"].load(sent.whole(), 1))
    assert engines["main"].policy.head_weight.dtype == torch.bfloat16
    out = asyncio.run(engines["main"].generate(PROMPT, SamplingParams(16), seed=2))
    assert off(policy, out) < 0.5


def test_what_does_not_fit_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """No folder on this machine; targets that the model does not have; the adapter of another rank, merged weights."""
    config = config_of(folder, *(f"agents.{role}.model={tmp_path}/nowhere" for role in ROLES))
    with pytest.raises(
        ConfigError, match=r"agents\.main\.engine\.adapters: .* agents\.main\.model, and .*nowhere"
    ):
        opened(config, folder, "main")
    with pytest.raises(
        ConfigError, match=r"left: no layer of LlamaForCausalLM is one of policy\.lora\.targets"
    ):
        opened(config_of(folder, "agents.left.policy.lora.targets=['c_attn']"), folder, "main", "left")
    engines = opened(config_of(folder), folder)
    for state, message in (
        (
            adapter_state(trained(folder, "left", 1)),
            r"weights lack model\.layers\.0\.mlp\.gate_proj\.lora_A\.weight",
        ),
        (state_of(trained(folder, "main", 1).model), r"weights lack .*lora_A"),
        (
            {n: t[:1] for n, t in adapter_state(trained(folder, "main", 1)).items()},
            r"of shape \(1, \d+\), expected",
        ),
    ):
        with versions() as sent:
            sent.put(state)
            with pytest.raises(ValueError, match=message):
                asyncio.run(engines["main"].load(sent.whole(), 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_base_of_the_same_shape_is_found_out(folder: Path, dtype: str) -> None:
    """The trainer's probe comes with each version: the folder on the worker's machine holds another model, nothing
    samples from it. The right one passes, in both precisions."""
    engine = f'agents.main.engine={{adapters=true, dtype="{dtype}"}}'
    assert config_of(folder, engine).agents["left"].engine.probed
    policy = trained(folder, "main", 1)
    said = probe(policy, probe_ids(policy, 32))
    with versions() as sent:
        sent.put(adapter_state(policy))
        right = opened(config_of(folder, engine), folder, "main")["main"]
        asyncio.run(right.load(replace(sent.whole(), probe=said), 1))
        assert right.version == 1
        save_policy(tiny_policy("llama", 4), folder)
        wrong = opened(config_of(folder, engine), folder, "main")["main"]
        with pytest.raises(
            ConfigError, match=r"main: with main\.e1\.v1 .* differ by \S+ nats .* is not the base model"
        ):
            asyncio.run(wrong.load(replace(sent.whole(), probe=said), 1))
        with pytest.raises(InfrastructureError, match="its weights are torn"):
            asyncio.run(wrong.generate(PROMPT, SamplingParams(4), seed=1))


def test_a_run_of_three_roles_on_one_base(folder: Path, tmp_path: Path) -> None:
    """Trained and sampled by whole runs' processes: what the engine reports is what each trainer computes for its own
    policy, and all of them learn."""
    each = [
        line
        for role in ROLES
        for line in (f"agents.{role}.model={folder}", f"agents.{role}.policy.lora={{rank=4, alpha=8.0}}")
    ]
    guests = [f'agents.{role}.engine={{shared_with="main"}}' for role in ROLES[1:]]
    out = tmp_path / "run"
    sets = ["trainer.steps=3", "trainer.old_logprobs=recompute", "agents.main.engine.adapters=true"]
    output = train(RELAY, out, *each, *guests, *sets)
    assert summary(out)["finished"], output
    rows = [row for row in records(out) if "main/reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in records(out):
        for role in ROLES:
            if f"{role}/policy/logprob_diff_max" in row:
                assert row[f"{role}/policy/logprob_diff_max"] < 1e-4
                assert row[f"{role}/staleness/max"] == 0
    assert any("left/policy/logprob_diff_max" in row for row in records(out))
