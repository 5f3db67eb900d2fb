"""safetensors files that are written one tensor at a time are those that others write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from mgrpo.model.policy import Policy, save_policy, state_of
from mgrpo.model.stream import PublishedTensor, WeightStream
from mgrpo.model.weight_files import write_weights
from tests.families import family
from tests.models import tiny_model, tiny_policy, tiny_tokenizer

MIXED = {
    "b.odd": torch.arange(3, dtype=torch.bfloat16),
    "a.wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "c.scalar": torch.tensor(7, dtype=torch.int64),
    "d.none": torch.zeros(0, 4),
    "e.flags": torch.tensor([True, False, True]),
    "f.half": torch.tensor([1.5, 2.5], dtype=torch.float16),
    "g.cut": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def listed(tensors: dict[str, Tensor]) -> list[PublishedTensor]:
    return [PublishedTensor(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]


def test_one_file_has_the_bytes_of_the_formats_own_writer(tmp_path: Path) -> None:
    """Types of all widths, a scalar, an empty tensor and one that does not lie in order, in any order."""
    write_weights(tmp_path, listed(MIXED), MIXED.items())
    whole = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    safetensors.torch.save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3Moe"])
def test_a_folder_has_the_bytes_that_transformers_writes(name: str, tmp_path: Path) -> None:
    """save_policy and save_pretrained: weights and configuration."""
    model = family(name)
    save_policy(Policy(model, tiny_tokenizer(), name), tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes(), file.name


def test_several_files_have_an_index_that_others_read(tmp_path: Path) -> None:
    """No file above the bound but for a tensor that exceeds it alone; each tensor once; transformers loads them."""
    model = tiny_model("llama")
    stream = WeightStream(model)
    bound = 10_000
    write_weights(tmp_path, stream.tensors, stream.read(), bound)
    model.config.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stream.tensors)
    for file in files:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
        assert names == {n for n, f in index["weight_map"].items() if f == file.name}
        size = sum(t.nbytes for t in stream.tensors if t.name in names)
        assert size <= bound or len(names) == 1
    loaded = state_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state_of(model).items())


def changed(tensors: dict[str, Tensor], how: str) -> Iterator[tuple[str, Tensor]]:
    for i, (name, tensor) in enumerate(tensors.items()):
        if how == "missing" and i == len(tensors) - 1:
            return
        yield name, tensor.double() if how == "dtype" and i == 1 else tensor
    if how == "extra":
        yield "h.more", torch.zeros(1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"g\.cut did not come"),
        ("dtype", r"a\.wide torch\.float64 \(2, 3\) came where a\.wide torch\.float32 \(2, 3\) was expected"),
        ("extra", r"h\.more comes after the 7 tensors"),
    ],
)
def test_other_tensors_than_expected_are_named(tmp_path: Path, how: str, message: str) -> None:
    """The header is on disk before they come, so it must be true."""
    with pytest.raises(ValueError, match=message):
        write_weights(tmp_path, listed(MIXED), changed(MIXED, how))


def test_weights_that_end_half_way_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    """A reader that fails in the middle of an export leaves the policy that was there."""
    policy = tiny_policy("llama")
    save_policy(policy, tmp_path / "final")
    before = (tmp_path / "final" / "model.safetensors").read_bytes()

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(WeightStream(policy.model).read())
        raise OSError("the link is gone")

    with pytest.raises(OSError, match="the link is gone"):
        save_policy(policy, tmp_path / "final", broken())
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == before
