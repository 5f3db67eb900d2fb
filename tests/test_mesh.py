"""policy.mesh: what four ranks compute, however they divide it, is what one process computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mgrpo.config import load_config, view_of
from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.model.mesh import check_mesh
from mgrpo.model.policy import save_policy
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.mesh_gradient import in_one_process
from tests.mesh_ranks import (
    LATER,
    MIDDLE,
    RANKS,
    RESUMED,
    VARIANTS,
    config_of,
    first_batches,
    learn_demos,
    policy_of,
    train,
)
from tests.models import tiny_policy
from tests.ranks import run_ranks
from tests.runs import RELAY
from tests.test_fsdp import furthest

Found = dict[str, Any]
KINDS = ("llama", "qwen3", "qwen3_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies to start from."""
    folder = tmp_path_factory.mktemp("mesh")
    for kind in KINDS:
        save_policy(policy_of(kind), folder / kind)
    save_policy(tiny_policy("shift"), folder / "shift")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """One process trains every variant and leaves a checkpoint of the middle."""
    found = {}
    for variant, (kind, *_) in VARIANTS.items():
        trainer = TorchTrainer(view_of(config_of(variant, 1), "main"), folder / "one" / variant, Ranks())
        found[variant] = train(trainer, folder / kind, save=True)
    return found


@pytest.fixture(scope="module")
def together(folder: Path, alone: Found) -> Found:
    """What four ranks found, see tests/mesh_ranks.py."""
    run_ranks("tests.mesh_ranks", str(folder), size=RANKS, timeout=1600)
    found: Found = torch.load(folder / "found.pt", weights_only=True)
    return found


def check_near(variant: str, found: Found, one: Found) -> None:
    """The trained weights of both: within 1e-5; in bfloat16, where AdamW makes whole steps of what is rounded
    otherwise, within a quarter of the way that they have gone."""
    if variant != "half":
        assert furthest(found["after"], one["after"]) < 1e-5
        return
    a, b, begin = (
        torch.cat([w[n].flatten() for n in sorted(w)]) for w in (found["after"], one["after"], one["before"])
    )
    assert float((a - b).norm()) < 0.25 * float((b - begin).norm())


def check_steps(variant: str, found: Found, one: Found) -> None:
    """The metrics of the steps that both took, and what both say of a prompt in the end."""
    half = variant == "half"
    for a, b in zip(one["metrics"][found["from"] :], found["metrics"], strict=True):
        assert a.keys() == b.keys() and "loss/pg" in a
        for name in ("loss/pg", "policy/entropy", "policy/grad_norm") if half else a:
            near = {"rel": 0.05, "abs": 0.02} if half else {"rel": 1e-4, "abs": 1e-5}
            assert b[name] == pytest.approx(a[name], **near), name
    torch.testing.assert_close(found["probe"], one["probe"], rtol=0, atol=0.05 if half else 1e-4)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in LATER])
def test_a_mesh_takes_the_steps_of_one_process(alone: Found, together: Found, variant: str) -> None:
    """Three steps of two minibatches, empty micro-batches among them: losses, gradient norms and weights agree to
    1e-5 (in bfloat16, to its precision), and the weights go out under the names of one process. What the trained
    weights say of a prompt in float32 is what one process says of its own."""
    one, mesh = alone[variant], together[f"run/{variant}"]
    assert furthest(one["before"], mesh["before"]) == 0.0
    check_near(variant, mesh, one)
    assert furthest(one["after"], one["before"]) > 1e-4
    check_steps(variant, mesh, one)


@pytest.mark.parametrize("variant", LATER)
def test_a_mesh_goes_on_as_one_process(alone: Found, together: Found, variant: str) -> None:
    """From one process's middle to its end, with a KL term that is not 0."""
    mesh = together[f"from one/{variant}"]
    assert mesh["from"] == MIDDLE and all(m["policy/kl"] > 1e-6 for m in mesh["metrics"])
    check_near(variant, mesh, alone[variant])
    check_steps(variant, mesh, alone[variant])


@pytest.mark.parametrize(
    ("name", "bound"),
    [("tp", 1.4), ("tp, last layer", 1.4), ("tp and ep", 1.4), ("cp", 1.1), ("cp, tp and ep", 1.4)],
)
def test_bfloat16_of_a_mesh_is_as_near_to_float32(
    folder: Path, together: Found, name: str, bound: float
) -> None:
    """The distance of a bfloat16 gradient from float32's, on a mesh and in one process: the geometric mean of their
    ratio over six minibatches. tp rounds each rank's part of a sum before they are added."""
    batches = first_batches()
    whole, alone = (in_one_process(name, folder, batches, dtype) for dtype in ("float32", "bfloat16"))
    ratios = [
        float((mesh - exact).norm() / (one - exact).norm())
        for exact, one, mesh in zip(whole, alone, together[f"gradient/{name}"], strict=True)
    ]
    assert math.prod(ratios) ** (1 / len(ratios)) < bound, ratios


@pytest.mark.parametrize("variant", RESUMED)
def test_a_checkpoint_fits_any_mesh(folder: Path, alone: Found, together: Found, variant: str) -> None:
    """The mesh resumes what one process wrote, and the other way round: it begins with the writer's bits and ends where
    the undisturbed run does."""
    mesh = together[f"from one/{variant}"]
    views = [view_of(config_of(variant, 1), "main")] * 2
    begun = [
        train(TorchTrainer(view, folder / place / variant, Ranks()), folder / VARIANTS[variant][0])
        for view, place in zip(views, ("one", "mesh"), strict=True)
    ]
    assert mesh["from"] == begun[0]["from"] == begun[1]["from"] == MIDDLE
    assert furthest(mesh["before"], begun[0]["before"]) == 0.0
    for found in (mesh, *begun):
        check_near(variant, found, alone[variant])


@pytest.mark.parametrize(("name", "written"), [("tp from dp", "dp"), ("ep from both", "tp and ep")])
def test_one_mesh_reads_the_checkpoint_of_another(
    alone: Found, together: Found, name: str, written: str
) -> None:
    """Four ranks that divide the policy otherwise than its writer go on from its weights and moments."""
    found = together[name]
    assert found["from"] == MIDDLE
    assert furthest(found["before"], together[f"run/{written}"]["before"]) > 1e-4


def test_the_final_policy_of_a_mesh_loads(folder: Path, together: Found) -> None:
    """Exported from tp = 2 and ep = 2: a plain model folder with the weights that were published last."""
    whole = load_policy(folder / "final")
    state = {name: tensor.detach() for name, tensor in whole.model.named_parameters()}
    published = together["run/tp and ep"]["after"]
    same = state.keys() & published.keys()
    assert "model.layers.1.self_attn.q_proj.weight" in same
    assert max(float((state[name] - published[name]).abs().max()) for name in same) == 0.0


def test_a_mesh_learns_demonstrations_as_one_process(folder: Path, together: Found) -> None:
    """Supervised steps with tp = 2 and ep = 2: the start policy of one process within 1e-5."""
    alone = TorchTrainer(view_of(config_of("tp and ep", 1), "main"), folder / "one" / "sft", Ranks())
    learn_demos(alone, folder / "qwen3_moe", folder / "sft of one")
    one, mesh, before = (
        safetensors.torch.load_file(folder / name / "model.safetensors")
        for name in ("sft of one", "sft of a mesh", "qwen3_moe")
    )
    assert furthest(one, mesh) < 1e-5 and furthest(one, before) > 5e-5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mesh": {"dp": 2, "tp": 2}}, (4, 2)),
        ({"ranks": 4, "mesh": {"tp": 2}}, (4, 2)),
        ({"ranks": 4}, (4, 4)),
        ({"ranks": 8, "mesh": {"replicate": 2, "tp": 2, "ep": 4}}, (8, 4)),
        ({"mesh": {"tp": 4}}, (4, 1)),
        ({"mesh": {"dp": 2, "cp": 2, "tp": 2, "ep": 8}}, (8, 2)),
        ({"ranks": 8, "mesh": {"replicate": 2, "cp": 2}}, (8, 4)),
        ({}, (1, 1)),
    ],
)
def test_ranks_are_the_product_of_the_mesh(settings: dict[str, Any], expected: tuple[int, int]) -> None:
    """Either is enough; data_ranks is how many batches the ranks share."""
    policy = PolicyConfig(**settings)
    assert (policy.ranks, policy.data_ranks) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 4, "mesh": {"dp": 2}}, r"ranks=4 should be mesh replicate=1 \* dp=2 \* cp=1 \* tp=1 = 2"),
        ({"ranks": 3, "mesh": {"tp": 2}}, r"ranks=3 should be a multiple of mesh .*tp=2 = 2"),
        (
            {"mesh": {"cp": 2}, "attention": "rows"},
            r'mesh\.cp=2 divides padded rows, attention "rows" computes others; use "auto"',
        ),
        (
            {"mesh": {"dp": 4, "ep": 3}},
            r"mesh\.ep=3 should be a multiple of tp=1 that divides dp \* cp \* tp = 4",
        ),
        ({"mesh": {"cp": 2, "tp": 2, "ep": 3}}, r"mesh\.ep=3 should .* tp=2 that divides dp \* cp \* tp = 4"),
        ({"mesh": {"dp": 2, "tp": 4, "ep": 2}}, r"mesh\.ep=2 should be a multiple of tp=4"),
        (
            {"mesh": {"dp": 2, "ep": 2}, "lora": {"rank": 4, "targets": ["experts.down_proj"]}},
            r"mesh\.ep=2 and lora\.targets with 'experts.down_proj' exclude each other",
        ),
        ({"mesh": {"tp": 2}, "lora": {"rank": 4}}, r"mesh\.tp=2 and lora\.rank=4 exclude each other"),
    ],
)
def test_a_mesh_that_does_not_come_out_even_is_refused(settings: dict[str, Any], message: str) -> None:
    """One line that names setting, value and bound, when the config is read."""
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "mesh", "message"),
    [
        ("shift", {"tp": 2}, r"policy\.mesh\.tp=2: .*no tensor-parallel plan for model type 'mgrpo_shift_"),
        (
            "llama",
            {"dp": 2, "ep": 2},
            r"policy\.mesh\.ep=2: .*no expert-parallel plan for model type 'llama'",
        ),
        ("llama", {"tp": 4}, r"policy\.mesh\.tp=4 does not divide num_key_value_heads=2 of 'llama'"),
        ("llama", {"tp": 3}, r"policy\.mesh\.tp=3 does not divide num_attention_heads=4 of 'llama'"),
        ("qwen3_moe", {"dp": 2, "cp": 3, "ep": 6}, r"policy\.mesh\.ep=6 does not divide num_experts=4"),
        ("qwen3_moe", {"dp": 3, "ep": 3}, r"policy\.mesh\.ep=3 does not divide num_experts=4"),
        (
            "qwen3_moe",
            {"tp": 2},
            r"policy\.mesh\.tp=2: .* cuts layers\.\*\.mlp\.experts.*set policy\.mesh\.ep",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(
    folder: Path, kind: str, mesh: dict[str, int], message: str
) -> None:
    """From config.json alone, by model type, setting and bound: a folder without weights is enough."""
    config = folder / kind / "config.json"
    empty = folder / f"only config of {kind}"
    empty.mkdir(exist_ok=True)
    (empty / "config.json").write_bytes(config.read_bytes())
    with pytest.raises(ConfigError, match=message):
        check_mesh(empty, PolicyConfig(mesh=mesh))  # type: ignore[arg-type]


def test_weights_straight_from_a_mesh_are_refused() -> None:
    """Ranks send their parts to servers where dp alone divides them."""
    engine = (
        'agents.main.engine={ type = "vllm", urls = ["http://127.0.0.1:1"], sync = "gloo", device = "cpu" }'
    )
    sets = [engine, "agents.main.policy.mesh={ dp = 2, tp = 2 }"]
    with pytest.raises(
        ConfigError, match=r"policy\.mesh tp=2, ep=1, cp=1, replicate=1: ranks send weights straight"
    ):
        load_config(RELAY, sets)
    load_config(RELAY, [engine, "agents.main.policy.mesh={ dp = 2 }"])


def test_a_vocabulary_that_does_not_divide_is_refused(folder: Path, tmp_path: Path) -> None:
    """The embedding is cut along the vocabulary."""
    save_policy(tiny_policy("llama"), tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"policy\.mesh\.tp=2 does not divide vocab_size=101 of 'llama'"):
        check_mesh(tmp_path / "odd", PolicyConfig(mesh={"tp": 2}))  # type: ignore[arg-type]
