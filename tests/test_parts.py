"""A rank reads from a policy's files what it holds: the bits of a whole model's, whatever the architecture; and what is
wrong with the files is said before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from mgrpo.config.policy import LoraConfig, MeshConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.head_guard import backbone_of
from mgrpo.model.loading import blank_policy, load_policy
from mgrpo.model.policy import Policy, save_policy
from mgrpo.model.precision import Precision
from mgrpo.model.trained import choose_trained
from mgrpo.model.weight_slices import WeightFiles
from mgrpo.trainers.torch.mesh import RankMesh
from mgrpo.trainers.torch.shard import allocate, begin_adapters, divide
from tests.families import FAMILIES, family
from tests.live_bytes import peak_bytes
from tests.models import VOCAB, tiny_model, tiny_tokenizer

REFUSED = {"Gemma2", "Granite", "Cohere", "Phi", "GPTJ", "Bert"}  # their logits are not hidden @ head.T
RANK_OF = {2: 1, 3: 0, 4: 2}
"""Ranks -> the one that this process is."""


@contextmanager
def as_one_of(size: int) -> Iterator[Any]:
    """The grid of `size` ranks as one of them sees it; nothing is sent. torch remembers parts by meshes, which are
    equal for all ranks of one size: what another test of this process was must be forgotten, and so must this."""
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", store=FakeStore(), rank=RANK_OF[size], world_size=size)
    try:
        yield RankMesh(MeshConfig(), size, "cpu")
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def read(folder: Path, mesh: Any, config: PolicyConfig | None = None) -> Any:
    """The model in `folder`, of which this rank has its part."""
    config = config or PolicyConfig()
    blank = blank_policy(folder, config)
    choose_trained(blank.model, config, blank.name)
    Precision(blank.model, config, blank.name)
    divide(blank.model, backbone_of(blank.model, blank.name), mesh, config)
    allocate(blank.model, torch.device("cpu"))
    blank.parts.read_into(blank.model)
    begin_adapters(blank.model)
    return blank.model


def assert_parts(model: Any, whole: Any) -> None:
    """Each parameter is this rank's part of the whole model's, bit for bit, and buffers are the same."""
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert isinstance(parameter, DTensor), name
        shape, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        part = expected[name][tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))]
        assert parameter.dtype == part.dtype and parameter.requires_grad == expected[name].requires_grad, name
        assert torch.equal(parameter.to_local(), part), name
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    tiny_tokenizer(VOCAB - 1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - REFUSED))
def test_every_architecture_is_read_in_parts(name: str, tmp_path: Path) -> None:
    """Experts that are fused in memory and rotary frequencies that are in no file included."""
    import transformers

    folder = saved(family(name), tmp_path / "model", max_shard_size="20KB")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    choose_trained(whole, PolicyConfig(), name)
    for size in RANK_OF:
        with as_one_of(size) as mesh:
            assert_parts(read(folder, mesh), whole)


def test_parts_are_those_of_the_rank_that_reads(tmp_path: Path) -> None:
    """Also in a process that was another rank of as many before, which torch would remember."""
    folder = saved(family("Llama"), tmp_path / "model")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        read(folder, RankMesh(MeshConfig(), 4, "cpu"))
    finally:
        dist.destroy_process_group()
    with as_one_of(4) as mesh:
        assert_parts(read(folder, mesh), load_policy(folder, PolicyConfig()).model)


@pytest.mark.parametrize("name", sorted(REFUSED - {"Bert"}))
def test_what_a_whole_policy_is_refused_for_is_refused_before_a_part_is_read(
    name: str, tmp_path: Path
) -> None:
    """From the configuration and the names of the parameters."""
    folder = saved(family(name), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"are not hidden @ head\.T"):
        blank_policy(folder, PolicyConfig())


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(lora=LoraConfig(rank=4, targets=("q_proj", "o_proj")), dtype="bfloat16"),
        PolicyConfig(last_layers=1, dtype="bfloat16", gradient_checkpointing=True),
    ],
)
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3Moe"])
def test_adapted_and_frozen_policies_are_read_in_parts(
    kind: str, config: PolicyConfig, tmp_path: Path
) -> None:
    """In the precision in which they are kept; adapters begin where a whole policy's do."""
    folder = tmp_path / "model"
    model = family(kind, tie_word_embeddings=kind == "Qwen2")
    save_policy(Policy(model, tiny_tokenizer(VOCAB - 1), kind), folder)
    whole = load_policy(folder, config).model
    with as_one_of(2) as mesh:
        assert_parts(read(folder, mesh, config), whole)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3Moe"])
def test_beside_its_part_a_rank_holds_one_group(kind: str, tmp_path: Path) -> None:
    """In tensor bytes; a reader of whole tensors is seen to hold more than twice as much."""
    layers, shape = 6, {"hidden_size": 128, "vocab_size": VOCAB, "num_hidden_layers": 6}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = family(kind, **shape, **(experts if kind == "Qwen3Moe" else {"intermediate_size": 256}))
    folder = saved(model, tmp_path / "model")
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    assert layers * layer > 0.8 * every
    with as_one_of(2) as mesh:
        most = peak_bytes(lambda: read(folder, mesh))
    assert every / 2 <= most < every / 2 + layer
    stored = WeightFiles(folder).tensors.values()
    assert peak_bytes(lambda: [tensor[...] for tensor in stored]) >= every


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A policy in several files."""
    return saved(family("Qwen3Moe"), tmp_path / "model", max_shard_size="20KB")


def _lose(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    return rf"names {file.name} \(\d+ tensors\), which is not there"


def _cut(folder: Path) -> str:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])
    return rf"{file.name} has \d+ bytes, its header says \d+: it is cut off"


def _cut_header(folder: Path) -> str:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    return rf"{file.name} cannot be read: .* the header is cut off"


def _no_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("[]")
    return "is no index of weights"


def _other_file(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name, file = "model.norm.weight", index["weight_map"]["model.embed_tokens.weight"]
    assert index["weight_map"][name] != file
    index["weight_map"][name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return rf"has model\.norm\.weight in {file}, which lacks it"


def _another_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["moe_intermediate_size"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    return r"mlp\.experts\.down_proj has shape \(2, 32, 16\), config\.json says \(2, 32, 24\)"


def _another_model(folder: Path) -> str:
    saved(tiny_model("llama"), folder)
    config = family("Qwen3Moe").config
    config.save_pretrained(folder)
    return r"its weights lack model\.layers\.0\.mlp\.\S+ \(\d+ tensors are missing\)"


def _fewer_experts(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    return r"experts\.\w+ has shape \(2, \d+, \d+\), config\.json says \(3, \d+, \d+\)"


def _no_safetensors(folder: Path) -> str:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").touch()
    return r"has neither model\.safetensors nor model\.safetensors\.index\.json"


def _quantised(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    return r"its weights are quantised \(fp8\)"


@pytest.mark.parametrize(
    "damage",
    [
        *(_lose, _cut, _cut_header, _no_index, _other_file, _another_shape, _another_model),
        *(_fewer_experts, _no_safetensors, _quantised),
    ],
)
def test_files_that_are_not_the_models_are_refused_by_name(
    files: Path, damage: Callable[[Path], str]
) -> None:
    """In one line, from headers alone, before a parameter has memory."""
    expected = damage(files)

    def refuse() -> None:
        with pytest.raises(ConfigError, match=expected) as raised:
            blank_policy(files, PolicyConfig())
        assert str(files) in str(raised.value) and "\n" not in str(raised.value)

    assert peak_bytes(refuse) < 20_000


def test_a_tied_head_may_be_stored_under_either_name_or_both(tmp_path: Path) -> None:
    """Both must be equal: the configuration says that they are one."""
    folder = saved(family("Qwen2", tie_word_embeddings=True), tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    whole = load_policy(folder).model
    embedding = tensors["model.embed_tokens.weight"]
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        rest = {name: t for name, t in tensors.items() if name != "model.embed_tokens.weight"}
        safetensors.torch.save_file(rest | {name: embedding.clone() for name in names}, file)
        with as_one_of(2) as mesh:
            assert_parts(read(folder, mesh), whole)
    safetensors.torch.save_file(tensors | {"lm_head.weight": embedding + 1}, file)
    with (
        as_one_of(2) as mesh,
        pytest.raises(ConfigError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"),
    ):
        read(folder, mesh)
