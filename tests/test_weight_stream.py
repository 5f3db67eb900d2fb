"""Weights leave a policy tensor after tensor: what state_of holds, bit for bit, with one group in memory at a time,
whether the policy is whole or lies on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mgrpo.model import names
from mgrpo.model.loading import load_policy
from mgrpo.model.lora import adapter_of
from mgrpo.model.policy import Policy, save_policy, state_of
from mgrpo.model.stream import WeightStream
from mgrpo.trainers.torch.ranks import Ranks
from tests.families import FAMILIES, family
from tests.live_bytes import peak_bytes
from tests.models import tiny_model, tiny_tokenizer
from tests.ranks import run_ranks
from tests.weight_ranks import (
    LAYERS,
    VARIANTS,
    Moved,
    large_model,
    layer_bytes,
    publish,
    published,
    start_policy,
    view_for,
)

Found = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies to start from."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in {kind for kind, _ in VARIANTS.values()}:
        save_policy(start_policy(kind), folder / kind)
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> list[Found]:
    """What each of two ranks found, see tests/weight_ranks.py."""
    run_ranks("tests.weight_ranks", str(folder))
    return [torch.load(folder / f"found-{r}.pt", weights_only=True) for r in range(2)]


def trainer_of(folder: Path, variant: str) -> Moved:
    return Moved(view_for(variant, 1), folder / "one" / variant, Ranks())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"Bert"}))
def test_every_architecture_is_read_as_state_of_has_it(name: str) -> None:
    """Names, bits and the layout that is known beforehand; conversions included."""
    model = family(name)
    stream = WeightStream(model)
    found = list(stream.read())
    assert [(t.name, t.dtype, t.shape) for t in stream.tensors] == [
        (n, t.dtype, tuple(t.shape)) for n, t in found
    ]
    assert all(t.is_contiguous() for _, t in found)
    assert_same(dict(found), state_of(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trainer_gives_the_state_of_its_policy(folder: Path, variant: str) -> None:
    """Merged adapters, or the adapter alone, beside biases, experts and frozen halves."""
    trainer = trainer_of(folder, variant)
    trainer.load(folder / VARIANTS[variant][0])
    model = trainer._own.policy.model
    whole = adapter_of(model.state_dict()) if variant == "adapter alone" else state_of(model)
    found = published(trainer)
    assert_same(dict(found), whole)
    assert [name for name, _ in found] == [name for name, _ in published(trainer)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_give_the_bits_of_one(folder: Path, together: list[Found], variant: str) -> None:
    """The same tensors in the same order, also after a reading that was given up, and as the final folder; the
    iterator that was given up says so."""
    one = publish(
        trainer_of(folder, variant), folder / VARIANTS[variant][0], folder / "one" / variant / "final"
    )
    two = together[0][variant]
    assert [name for name, _ in two["weights"]] == [name for name, _ in one["weights"]]
    assert_same(dict(two["weights"]), dict(one["weights"]))
    assert_same(dict(two["part"]), dict(one["weights"][:3]))
    assert "not complete: something else was begun" in two["refused"] == one["refused"]
    assert two["probe"][0] == one["probe"][0]
    assert two["probe"][1] == pytest.approx(one["probe"][1], rel=1e-5, abs=1e-5)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        ours, theirs = (folder / ranks / variant / "final" / file for ranks in ("one", "two"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    final = safetensors.torch.load_file(folder / "two" / variant / "final" / "model.safetensors")
    if variant != "adapter alone":
        assert_same(final, dict(two["weights"]))
    load_policy(folder / "two" / variant / "final")


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3Moe"])
def test_one_group_is_in_memory_at_a_time(kind: str) -> None:
    """Reading a model of six layers with a copy of each group, as gathering makes it, holds less than two layers; a
    reader that keeps everything is seen to hold all of them."""
    model = large_model(kind)
    layer, stream = layer_bytes(model), WeightStream(model)

    def read() -> None:
        for _, tensor in stream.read(torch.clone):
            tensor.to(torch.bfloat16)

    assert 0 < peak_bytes(read) < 2 * layer
    assert peak_bytes(lambda: list(stream.read(torch.clone))) > LAYERS * layer


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3Moe"])
def test_ranks_hold_one_group_at_a_time(together: list[Found], kind: str) -> None:
    """Rank 0 has each tensor whole; the one that sends its parts allocates nothing."""
    most, layer = together[0]["peaks"][kind]
    assert 0 < most < 2 * layer
    assert together[1]["peaks"][kind] == (0, layer)


def test_an_export_holds_one_group_at_a_time(tmp_path: Path) -> None:
    """The final folder of a model with experts is written from views of its weights."""
    model = large_model("Qwen3Moe")
    policy = Policy(model, tiny_tokenizer(), "large")
    assert peak_bytes(lambda: save_policy(policy, tmp_path / "final")) < layer_bytes(model)


def test_conversions_that_look_at_other_names_are_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renaming that depends on a name of another group gives what it gives for the whole state."""
    plain = names.published

    def with_a_guard(model: Any, state: dict[str, Tensor]) -> dict[str, Any]:
        guarded = "model.norm.weight" in state
        return {
            f"guarded.{n}" if guarded and "down_proj" in n else n: torch.stack([t])[0]
            if "down_proj" in n
            else t
            for n, t in plain(model, state).items()
        }

    monkeypatch.setattr(names, "published", with_a_guard)
    model = tiny_model("llama")
    found = dict(WeightStream(model).read())
    assert "guarded.model.layers.1.mlp.down_proj.weight" in found
    assert_same(found, state_of(model))


def test_weights_are_those_of_the_moment(folder: Path) -> None:
    """What was read after an update is the update's; a read model is never changed."""
    trainer = trainer_of(folder, "untied")
    trainer.load(folder / "llama")
    before = dict(published(trainer))
    with torch.no_grad():
        trainer._own.policy.head_weight.add_(1.0)
    after = dict(published(trainer))
    assert {n for n, t in after.items() if not torch.equal(t, before[n])} == {"lm_head.weight"}
