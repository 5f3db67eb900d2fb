"""`mgrpo plan` with policy.mesh: predictions are what ranks of tp and ep take in a real step."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from mgrpo.cli.plan import _what_if
from mgrpo.config import load_config, view_of
from mgrpo.errors import ConfigError
from mgrpo.planning import state
from mgrpo.planning.assumptions import GPUS, Assumptions
from mgrpo.planning.plan import _harmless, limits_of, plan_agent
from mgrpo.planning.speed import split_of
from mgrpo.planning.step import plan_step
from mgrpo.planning.traffic import traffic_of
from tests.ranks import run_ranks
from tests.runs import RELAY
from tests.test_planning import KINDS, SIZES, config_of, overrides, saved

KIND = {"dense": ("Qwen3", {**SIZES, "head_dim": 32}), "moe": KINDS["moe"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense policy and a mixture of 4 experts, 2 of them a token."""
    return saved(tmp_path_factory.mktemp("models"), KIND)


@pytest.mark.parametrize(
    ("kind", "size", "policy"),
    [
        ("dense", 4, ("mesh={dp=2,tp=2}",)),
        ("dense", 2, ("mesh={tp=2}", 'dtype="bfloat16"', "gradient_checkpointing=true")),
        ("moe", 2, ("mesh={dp=2,ep=2}", "gradient_checkpointing=true")),
        ("moe", 4, ("mesh={dp=4,ep=4}", "aux_loss_coef=0.1")),
        ("moe", 4, ("mesh={dp=4,ep=2}", 'dtype="bfloat16"')),
        ("moe", 4, ("mesh={dp=2,tp=2,ep=2}", "gradient_checkpointing=true")),
    ],
    ids=["tp", "tp, bfloat16", "ep", "ep over all", "ep, bfloat16", "tp and ep"],
)
@pytest.mark.timeout(1800)
def test_peak_is_that_of_a_real_step(
    models: Path, tmp_path: Path, kind: str, size: int, policy: tuple[str, ...]
) -> None:
    """The bytes of weights, gradients and optimizer of rank 0 are those of a real one of as many over gloo, but for
    buffers and counters of steps; the peak is the one of the allocator's events, within 5 %. The real routers send as
    many tokens to one expert as to another, and their ranks exchange their numbers."""
    sets = overrides(models, kind, *policy)
    run_ranks("tests.plan_ranks", str(RELAY), str(tmp_path / "out"), *sets, size=size, timeout=1700)
    measured = json.loads((tmp_path / "out").read_text())
    predicted, _ = plan_step(models / kind, view_of(load_config(RELAY, sets), "main"), "agents.main.model")
    kept = predicted.masters + predicted.gradients + predicted.optimizer
    assert kept <= measured["state"] <= kept * 1.001 + 4096
    assert predicted.peak == pytest.approx(measured["peak"], rel=0.05)


def test_what_a_mesh_leaves_a_rank(models: Path) -> None:
    """Experts spread over 4 ranks are no longer gathered: of a layer's, 4 x 3 x 128 x 96 floats, a quarter is there;
    the weights that stay are as many."""
    alone, spread = (
        plan_step(
            models / "moe",
            view_of(
                config_of(models, "moe", f"mesh={{dp=4,ep={ep}}}", "gradient_checkpointing=true"), "main"
            ),
            "x",
        )[0]
        for ep in (1, 4)
    )
    assert (spread.masters, spread.optimizer) == (alone.masters, alone.optimizer)
    assert alone.peak - spread.peak > 0.75 * 4 * 3 * 128 * 96 * 4


def test_launcher_counts_no_more_than_a_rank_holds(models: Path) -> None:
    """What the launcher refuses for certain is at most what the plan says of rank 0, and all but the norms, which tp
    does not cut."""
    for kind, mesh in (("dense", "dp=2,tp=2"), ("moe", "dp=2,tp=2,ep=4"), ("moe", "dp=4,ep=2")):
        view = view_of(config_of(models, kind, f"mesh={{{mesh}}}"), "main")
        memory, _ = plan_step(models / kind, view, "x")
        kept = memory.masters + memory.gradients + memory.optimizer
        found = state._state(str(models / kind), view.agent.policy, view.ranks, frozen=False)
        assert found is not None
        assert 0.98 * kept < found.nbytes <= kept


def test_a_mesh_that_does_not_fit_the_model_is_refused(models: Path) -> None:
    """As loading refuses it, by the setting and the bound."""
    for kind, mesh, reason in (
        ("dense", "tp=8", r"mesh\.tp=8 does not divide num_attention_heads=4"),
        ("moe", "dp=8,ep=8", r"mesh\.ep=8 does not divide num_experts=4"),
        ("dense", "dp=2,ep=2", r"no expert-parallel plan"),
    ):
        config = config_of(models, kind, f"mesh={{{mesh}}}")
        with pytest.raises(ConfigError, match=reason):
            plan_step(models / kind, view_of(config, "main"), "agents.main.model")


def test_one_mesh_after_another(models: Path) -> None:
    """Plans of one process, for two agents or for suggestions: what torch remembers of a mesh's groups by their names
    is not taken for those of the next, which has more groups."""
    meshes = ("mesh={cp=2,tp=2}", "mesh={dp=2,tp=2}")
    found = [
        plan_step(models / "dense", view_of(config_of(models, "dense", mesh), "main"), "x")[0]
        for mesh in meshes
    ]
    assert found[0].masters == found[1].masters and found[0].activations < found[1].activations


def test_routing_replay_is_planned(models: Path) -> None:
    """Fake routers choose nothing, so the replay is not proved on them; a dense model is refused as before a run."""
    for mesh in ("ranks=1", "mesh={cp=2,ep=2}"):
        free, forced = (
            plan_step(models / "moe", view_of(config_of(models, "moe", mesh, *more), "main"), "x")[0]
            for more in ((), ("routing_replay=true",))
        )
        assert forced.masters == free.masters and forced.peak == pytest.approx(free.peak, rel=0.1)
    with pytest.raises(ConfigError, match=r"policy\.routing_replay=true needs a mixture of experts"):
        plan_step(models / "dense", view_of(config_of(models, "dense", "routing_replay=true"), "main"), "x")


def test_spreading_experts_is_suggested(models: Path) -> None:
    """For a mixture, over the GPUs of a host, where it can be planned and holds less; never for a dense model, nor
    where the experts do not divide."""
    sets = overrides(models, "moe", 'device="cuda"', "ranks=4", "gradient_checkpointing=true")
    change = "agents.main.policy.mesh.ep=2"
    assert (change,) in [c for c, _ in _harmless(load_config(RELAY, sets), "main", 2)]
    bare = limits_of(GPUS["h100"], 1e6, 1e12, Assumptions(context=0.0, fragmentation=0.0))
    before, after = (plan_agent(load_config(RELAY, s), "main", bare) for s in (sets, [*sets, change]))
    assert "ep 2" in after.settings
    assert after.needed < before.needed
    beside = config_of(models, "moe", 'device="cuda"', "mesh={dp=2,cp=2}")
    assert (change,) in [c for c, _ in _harmless(beside, "main", 2)]
    for kind, ranks, per_host in (("dense", 4, 2), ("moe", 8, 8)):
        config = config_of(models, kind, 'device="cuda"', f"ranks={ranks}")
        assert not [c for changes, _ in _harmless(config, "main", per_host) for c in changes if ".ep=" in c]


def test_more_gpus_with_a_mesh(models: Path) -> None:
    """As many GPUs as asked go to mesh.dp, also where the config gives that a number; so do those that a suggestion
    adds."""
    sets = overrides(models, "dense", "mesh={dp=2,tp=2}", 'device="cuda"', "gradient_checkpointing=true")
    mesh = load_config(RELAY, [*sets, *_what_if("gpus=8", ("main",))]).agents["main"].policy
    assert (mesh.ranks, mesh.data_ranks, mesh.mesh.tp) == (8, 4, 2)
    changes = [change for change, _ in _harmless(load_config(RELAY, sets), "main", 8)]
    policy = load_config(RELAY, [*sets, *changes[-1]]).agents["main"].policy
    assert (policy.ranks, policy.data_ranks, policy.mesh.tp) == (8, 4, 2)


def test_time_with_experts_spread(models: Path) -> None:
    """A rank gathers what tp and ep leave of a layer, and the tokens' vectors travel: by hand, for a link that is all
    that counts."""
    sets = ("mesh={dp=4,ep=4}", 'device="cuda"', 'dtype="bfloat16"', "gradient_checkpointing=true")
    config = config_of(models, "moe", *sets)
    view = view_of(config, "main")
    _, found = plan_step(models / "moe", view, "x")
    assert (found.experts, found.chosen) == (3 * 4 * 3 * 128 * 96, 2)
    assumed = Assumptions(within=1e3, gpus_per_host=4)
    traffic = dataclasses.replace(traffic_of(config, view, found, assumed), tokens=10_000)
    split = split_of(config, view, found, traffic, GPUS["h100"], assumed)
    steps = math.ceil(10_000 / (512 * 4))
    gathered = (found.total - found.experts + found.experts / 4) * 8 * steps
    sent = 2_500 * 2 * 2 * 128 * 2 * 3 * 3  # tokens, there and back, experts, width, bytes, passes, layers
    assert split.train == pytest.approx((gathered + sent) / 1e3)


def test_tokens_are_routed_evenly() -> None:
    """The stand-in for the exchange of numbers gives the first rank of a group what it would send to itself, of each;
    and it ends with the block."""
    from transformers.distributed import expert_parallel

    from mgrpo.planning.routing import even_routing

    before = expert_parallel.all_to_all_single, expert_parallel.AllToAllEP._dispatch_tokens
    with even_routing():
        sent = torch.tensor([[3, 2], [2, 2], [2, 2]])
        received = torch.empty_like(sent)
        expert_parallel.all_to_all_single(received, sent, group=None)
        assert received.tolist() == [[3, 2]] * 3
    assert (expert_parallel.all_to_all_single, expert_parallel.AllToAllEP._dispatch_tokens) == before
