"""`mgrpo plan`: predictions are what a real step takes, suggestions are computed, what cannot fit is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mgrpo.cli import app
from mgrpo.config import RunConfig, load_config, view_of
from mgrpo.errors import ConfigError
from mgrpo.model.policy import Policy, save_policy
from mgrpo.planning import state
from mgrpo.planning.assumptions import GPUS, Assumptions, assume, memory_of
from mgrpo.planning.fake import FakeTensors
from mgrpo.planning.page import as_dict, render
from mgrpo.planning.plan import Limits, limits_of, plan_agent, suggest
from mgrpo.planning.process import process_bytes
from mgrpo.planning.step import PlannedRanks, plan_step
from mgrpo.trainers.torch.ranks import Ranks
from tests.families import family
from tests.live_bytes import peak_bytes
from tests.models import tiny_tokenizer
from tests.plan_ranks import measure
from tests.ranks import run_ranks
from tests.runs import RELAY

ROOT = Path(__file__).parent.parent
VOCAB = 600
BATCH = ("agents.main.max_length=64", "trainer.micro_batch=512")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen2", SIZES),
    "tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "moe": ("Qwen3Moe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small policies by kind."""
    return saved(tmp_path_factory.mktemp("models"), KINDS)


def saved(folder: Path, kinds: Mapping[str, tuple[str, dict[str, Any]]]) -> Path:
    for kind, (name, changes) in kinds.items():
        save_policy(Policy(family(name, **changes), tiny_tokenizer(VOCAB - 8), kind), folder / kind)
    return folder


def overrides(models: Path, kind: str, *policy: str) -> list[str]:
    sets = [f"agents.main.policy.{setting}" for setting in policy]
    return [f'agents.main.model="{models / kind}"', "agents.main.sft.steps=0", *BATCH, *sets]


def config_of(models: Path, kind: str, *policy: str) -> RunConfig:
    return load_config(RELAY, overrides(models, kind, *policy))


LORA = ("lora.rank=4", 'lora.targets=["q_proj", "v_proj"]')


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("dense", ()),
        ("dense", ("gradient_checkpointing=true",)),
        ("tied", ("last_layers=1",)),
        ("tied", ('dtype="bfloat16"',)),
        ("dense", ('attention="varlen"', *LORA)),
        ("dense", ('dtype="bfloat16"', *LORA)),
        ("moe", ()),
    ],
)
def test_peak_is_that_of_a_real_step(models: Path, kind: str, policy: tuple[str, ...]) -> None:
    """The predicted bytes of weights, gradients and optimizer are those of a real trainer, exactly, and the peak is the
    one that the allocator's events show while it takes the same step, within 3 %."""
    view = view_of(config_of(models, kind, *policy), "main")
    predicted, _ = plan_step(models / kind, view, "agents.main.model")
    measured = measure(view, Ranks(), peak_bytes)
    kept = predicted.masters + predicted.frozen + predicted.gradients + predicted.optimizer
    assert kept <= measured["state"] <= kept * 1.001 + 4096  # buffers, counters of steps
    assert predicted.peak == pytest.approx(measured["peak"], rel=0.03)


@pytest.mark.parametrize(
    "loss",
    [("kl_coef=0.1",), ('type="tests.own_losses:Pull"', "options={spring=0.1}")],
    ids=["reference", "own"],
)
def test_peak_with_what_losses_look_at(models: Path, loss: tuple[str, ...]) -> None:
    """Log-probs of a reference, whose values are checked, and a loss of one's own, which gets the finite rows alone:
    nothing is wrong with what has no data, and all rows count."""
    sets = [*overrides(models, "dense"), *(f"agents.main.loss.{part}" for part in loss)]
    view = view_of(load_config(RELAY, sets), "main")
    predicted, _ = plan_step(models / "dense", view, "agents.main.model")
    measured = measure(view, Ranks(), peak_bytes)
    kept = predicted.masters + predicted.frozen + predicted.gradients + predicted.optimizer
    assert kept <= measured["state"] <= kept * 1.001 + 4096
    assert predicted.peak == pytest.approx(measured["peak"], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("dense", ("ranks=2", 'dtype="bfloat16"', "gradient_checkpointing=true")),
        ("dense", ("mesh={cp=2}",)),
        ("moe", ("mesh={cp=2}", "aux_loss_coef=0.01")),
    ],
    ids=["bfloat16", "divided rows", "divided rows of a mixture"],
)
def test_peak_on_two_ranks_is_that_of_a_real_step(
    models: Path, tmp_path: Path, kind: str, policy: tuple[str, ...]
) -> None:
    """The same for one of two ranks over gloo, whose twin is fake in the prediction."""
    sets = overrides(models, kind, *policy)
    run_ranks("tests.plan_ranks", str(RELAY), str(tmp_path / "out"), *sets)
    measured = json.loads((tmp_path / "out").read_text())
    view = view_of(load_config(RELAY, sets), "main")
    predicted, found = plan_step(models / kind, view, "agents.main.model")
    kept = predicted.masters + predicted.gradients + predicted.optimizer
    assert kept == pytest.approx(found.total * 16 / 2, rel=0.01)
    assert measured["state"] == pytest.approx(kept, rel=0.01)
    assert predicted.peak == pytest.approx(measured["peak"], rel=0.05)


def test_a_plan_with_routing_replay(models: Path) -> None:
    """The same memory as without, where rows are padded; the log has 1 byte of 3 routers x 2 experts a token more."""
    plain, replayed = (
        plan_agent(config_of(models, "moe", 'attention="sdpa"', replay), "main", limits(1e12))
        for replay in ("routing_replay=false", "routing_replay=true")
    )
    assert replayed.memory == plain.memory
    tokens = plain.traffic.tokens
    assert tokens > 0 and replayed.traffic.log - plain.traffic.log == 6 * tokens
    view = view_of(config_of(models, "moe", "routing_replay=true"), "main")
    assert plan_step(models / "moe", view, "agents.main.model")[0] == plain.memory  # "rows" becomes "sdpa"


def test_a_cpu_needs_what_its_process_holds_too(models: Path) -> None:
    """What a trainer without a model holds is measured, and is part of what a rank on the CPU needs."""
    config = config_of(models, "dense")
    plan = plan_agent(config, "main", limits(1e12))
    beside = process_bytes()
    assert 100e6 < beside < 4e9  # torch alone is more than the one, no library more than the other
    assert plan.needed == plan.memory.peak + beside
    assert plan.host.processes == beside


def test_divided_rows_leave_half_of_the_activations(models: Path) -> None:
    """Two ranks of cp share a micro-batch; two of dp have one each, with the same shards of weights."""
    found = {
        mesh: plan_step(
            models / "dense", view_of(config_of(models, "dense", f"mesh={{{mesh}=2}}"), "main"), "x"
        )[0]
        for mesh in ("dp", "cp")
    }
    assert found["cp"].masters == found["dp"].masters
    assert found["cp"].activations < 0.65 * found["dp"].activations


def test_state_of_a_large_model_on_many_ranks() -> None:
    """Qwen3-8B on 8 ranks from its config.json alone: 16 bytes a parameter over the ranks, and 8.19 billion of them."""
    config = load_config(ROOT / "bench/plans/qwen3-8b.toml", ["trainer.micro_batch=8192"])
    model = str(ROOT / "bench/plans/qwen3-8b")
    view = view_of(config, "main")
    view = dataclasses.replace(view, agent=view.agent.model_copy(update={"model": model}))
    memory, found = plan_step(Path(model), view, "agents.main.model")
    assert found.total == found.trained == 8_190_735_360
    assert memory.masters + memory.gradients + memory.optimizer == pytest.approx(
        found.total * 16 / 8, rel=1e-3
    )
    assert memory.state < memory.peak < 45e9


def test_fake_tensors_hold_nothing_and_count_everything() -> None:
    """64 GB fit into no memory at all; a tensor that ends is no longer counted, and the peak stays."""
    with FakeTensors() as tensors:
        large = torch.empty(4_000_000_000, 4)
        assert tensors.live == 64_000_000_000
        part = large[:10].clone()
        del large
        assert tensors.live == part.numel() * 4
    assert tensors.peak == 64_000_000_160


def test_numbers_that_steer_are_real() -> None:
    """Token ids and masks are computed with; a number read out of a fake tensor is 0 and a condition on it holds."""
    with FakeTensors():
        table = torch.zeros(100, 8)
        ids = torch.arange(10)
        assert int(ids[3:].sum()) == 42
        mask = ids > 6
        assert table[ids][mask].shape == (3, 8)
        assert float(table.sum()) == 0.0
        assert torch.isfinite(table.sum())


def limits(memory: float, host: float = 1e12) -> Limits:
    return limits_of(GPUS["h100"], memory, host, Assumptions())


def test_suggestions_are_computed(models: Path) -> None:
    """Where a step does not fit, a change that is named needs what the plan of the changed config says, and one that
    fits says so."""
    sets = overrides(models, "dense", 'device="cuda"', 'dtype="bfloat16"')
    plan = plan_agent(load_config(RELAY, sets), "main", limits(1e12))
    bare = Assumptions(context=0.0, fragmentation=0.0)
    tight = limits_of(GPUS["h100"], plan.memory.peak - 1.0, 1e12, bare)
    assert not plan_agent(load_config(RELAY, sets), "main", tight).fits
    found = suggest(RELAY, sets, "main", tight)
    assert found
    assert any(s.fits for s in found)
    suggestion = next(s for s in found if s.fits)
    again = plan_agent(load_config(RELAY, [*sets, *suggestion.change]), "main", tight)
    assert (again.needed, again.fits) == (suggestion.needed, suggestion.fits)
    assert again.needed < plan.memory.peak


def test_page_and_json_say_the_same(models: Path) -> None:
    """Every size on the page stands in the JSON in bytes; both say that they are predictions."""
    plan = plan_agent(config_of(models, "dense"), "main", limits(1e12))
    page, tree = render([(plan, [])], limits(1e12)), as_dict([(plan, [])], limits(1e12))
    assert page.startswith("predicted")
    assert tree["predicted"] is True
    agent = json.loads(json.dumps(tree))["agents"][0]
    assert agent["memory"]["peak"] == plan.memory.peak
    assert f"{plan.memory.peak / 1e9:.2f}" in page
    assert agent["fits"] is True
    assert agent["traffic"]["version"] == 4 * plan.parameters.total


def test_command(models: Path) -> None:
    """`mgrpo plan` prints JSON for a config with overrides, on as many GPUs as asked, without a GPU; bad options are
    refused by name."""
    sets = [text for s in overrides(models, "dense", 'dtype="bfloat16"') for text in ("--set", s)]
    command = ["plan", str(RELAY), *sets, "--what-if", "gpus=4", "--host-memory", "1TB", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    agents = json.loads(result.output)["agents"]
    assert [agent["role"] for agent in agents] == list(load_config(RELAY).policy_roles)
    assert {(agent["ranks"], agent["device"]) for agent in agents} == {(4, "cuda")}
    for option, value in (
        ("--what-if", "cpus=3"),
        ("--gpu", "abacus"),
        ("--gpu-memory", "much"),
        ("--assume", "x=1"),
    ):
        failed = CliRunner().invoke(app, ["plan", str(RELAY), option, value])
        assert isinstance(failed.exception, ConfigError)
        assert option in str(failed.exception)


def test_sizes_and_assumptions() -> None:
    assert memory_of("80GB", "--gpu-memory") == 80e9
    assert memory_of(" 2 gib", "--gpu-memory") == 2 * 2**30
    assert assume(["train_mfu=0.5", "gpus_per_host=4"]) == Assumptions(train_mfu=0.5, gpus_per_host=4)
    with pytest.raises(ConfigError, match="gpus_per_host"):
        assume(["gpus_per_host=1.5"])


def test_missing_config_is_named(models: Path, tmp_path: Path) -> None:
    view = view_of(config_of(models, "dense"), "main")
    with pytest.raises(ConfigError, match=r"agents\.main\.model: .* has no config\.json"):
        plan_step(tmp_path, view, "agents.main.model")


def test_launcher_refuses_what_cannot_fit(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and Adam of a policy in 16 bytes a parameter above the machine's memory are refused with the
    numbers; a byte more memory is enough."""
    config = config_of(models, "dense", "ranks=2")
    parameters = sum(p.numel() for p in family(*KINDS["dense"][:1], **KINDS["dense"][1]).parameters())
    monkeypatch.setattr(state, "host_memory", lambda swap: 16.0 * parameters)
    state.check_state(config)
    monkeypatch.setattr(state, "host_memory", lambda swap: 16.0 * parameters - 1)
    with pytest.raises(ConfigError, match=r"agents\.main.*this machine has"):
        state.check_state(config)
    state.check_state(config_of(models, "dense", "last_layers=1"))
    state.check_state(config_of(models, "dense", *LORA))


def test_launcher_refuses_what_no_gpu_holds(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a GPU, with the number of ranks that would be enough; a copy of the shards (HSDP) saves nothing;
    where the driver does not say, nothing is refused."""
    config = config_of(models, "dense", 'device="cuda"')
    found = state._state(str(models / "dense"), config.agents["main"].policy, 1, frozen=False)
    assert found is not None
    monkeypatch.setattr(state, "gpu_memory", lambda: found.nbytes / 3)
    with pytest.raises(ConfigError, match=r"agents\.main\.policy: .*on each of ranks=1.*policy\.ranks to 4"):
        state.check_state(config)
    copies = config_of(models, "dense", 'device="cuda"', "mesh={replicate=2}")
    with pytest.raises(ConfigError, match=rf" {found.nbytes / 1e9:.1f} GB on each of ranks=2"):
        state.check_state(copies)  # each copy has all of it
    monkeypatch.setattr(state, "gpu_memory", lambda: None)
    state.check_state(config)


def test_planned_ranks_are_alone() -> None:
    """What every rank says is what this one says."""
    assert PlannedRanks(3).gather("x") == ["x"] * 3
