"""A policy on two ranks never lies whole on one of them, wrong files on one are refused on both, and SFT on two ranks
takes the steps of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mgrpo.model.policy import Policy, save_policy
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.trainer import TorchTrainer
from tests.families import family
from tests.models import VOCAB, tiny_policy, tiny_tokenizer
from tests.ranks import run_ranks
from tests.shard_ranks import LAYERS, SFT, demos, view_for

Found = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def large_model() -> Any:
    """Many layers, each larger than all beside them."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    return family("Qwen2", **shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies to start from."""
    folder = tmp_path_factory.mktemp("shards")
    save_policy(tiny_policy("llama"), folder / "llama")
    save_policy(Policy(large_model(), tiny_tokenizer(VOCAB - 1), "large"), folder / "large")
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> list[Found]:
    """What each of two ranks found, see tests/shard_ranks.py."""
    run_ranks("tests.shard_ranks", str(folder))
    return [torch.load(folder / f"found-{r}.pt", weights_only=True) for r in range(2)]


def test_other_files_on_one_rank_are_refused_on_both(together: list[Found]) -> None:
    """Each names the other; no rank waits for one that has ended."""
    for rank, found in enumerate(together):
        message = found["refused"]["another config"]
        assert f"rank {1 - rank} finds other files there" in message and f"than rank {rank}" in message


def test_a_bad_file_on_one_rank_is_refused_on_both(together: list[Found]) -> None:
    """In the words of the rank that has it."""
    first, second = (found["refused"]["a shorter file"] for found in together)
    assert first == second and "own-1" in first and "it is cut off or damaged" in first


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_has_the_whole_model(together: list[Found], rank: int) -> None:
    """Half of the float32 weights and a few layers while a policy is loaded and judged; less than all of the gradient
    in a step, half of which stays (8 to 10 layers of 12). How many layers are under way at a time depends on the ranks'
    pace. A model that keeps what it has gathered is seen to hold all of it."""
    model = large_model()
    every = 4 * sum(p.numel() for p in model.parameters())
    layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    found = together[rank]["memory"]
    assert every / 2 <= found["load"] < every / 2 + 5 * layer < every
    assert found["forward"] < 3 * layer  # gathered in bfloat16: half of this is the next layer
    assert found["kept"] > every / 2
    assert found["step"] < every


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_travel_in_bfloat16_and_gradients_in_float32(together: list[Found], rank: int) -> None:
    """2 B a parameter and rank in each forward and in each backward, 4 of the embedding, which is looked up in float32,
    and 4 of the head once; half of a float32 gradient arrives."""
    model = large_model()
    count, embedding = sum(p.numel() for p in model.parameters()), model.model.embed_tokens.weight.numel()
    found = together[rank]["memory"]
    gathered, reduced = (found["bytes"][name] / found["micro"] for name in ("gathered", "reduced"))
    assert 4 * count <= gathered <= 1.001 * (4 * count + 4 * embedding)
    assert 2 * count <= reduced <= 1.001 * 2 * count


def test_sft_on_two_ranks_takes_the_steps_of_one(folder: Path, together: list[Found]) -> None:
    """Odd batches, and one with fewer sequences than ranks."""
    trainer = TorchTrainer(view_for(1), folder / "one", Ranks())
    losses: list[float] = []
    trainer.sft(folder / "llama", folder / "one" / "start", demos, SFT, 1e-2, lambda _, x: losses.append(x))
    one, two, before = (
        safetensors.torch.load_file(folder / place / "model.safetensors")
        for place in ("one/start", "two/start", "llama")
    )
    assert one.keys() == two.keys()
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5
    assert max(float((one[n] - before[n]).abs().max()) for n in one) > 1e-2
    assert losses == pytest.approx(together[0]["losses"], abs=1e-5) and len(losses) == 1
