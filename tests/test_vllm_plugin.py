"""The plug-in's work on a model: patches in place against whole versions, what it refuses, what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mgrpo.engines.labels import Label, parse_label
from mgrpo.engines.vllm.plugin.loading import SUMS
from mgrpo.engines.weight_folder import KEEP, REBASE, WeightFolder
from mgrpo.errors import CorruptionError
from mgrpo.weights.version import Weights
from tests.plugin_kit import Double, Worker, moved, patch, raw, state, whole


def load(worker: Worker, folder: WeightFolder, weights: Weights) -> str:
    """Bring a whole version; what it refused."""
    folder.add(weights)
    label = parsed(weights.label)
    return str(worker.mgrpo_load(str(folder.make_whole(label)), weights.label)["error"])


def apply(worker: Worker, folder: WeightFolder, base: str, label: str, /, **other: Any) -> str:
    """Bring a patch that lies in the folder; what it refused. other: than what is known of the file."""
    (found,) = folder.patches(base, parsed(label)) or []
    known = {"base": base, "label": label, "size": found.size, "crc": found.crc} | other
    return str(worker.mgrpo_patch(str(found.path), **known)["error"])


def parsed(label: str) -> Label:
    found = parse_label(label)
    assert found is not None
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_in_place_are_whole_versions(tmp_path: Path, ranks: int, dtype: torch.dtype) -> None:
    """Twenty steps, bit for bit, in fused and in cut parameters, on each tensor-parallel rank; some move everything."""
    folder = WeightFolder(tmp_path)
    workers = [Worker(Double(rank, ranks, dtype)) for rank in range(ranks)]
    now = state(0, dtype)
    for worker in workers:
        assert not load(worker, folder, whole("e1.v0", 0, now))
    for step in range(1, 21):
        after = moved(now, step, 1.0 if step % 5 == 0 else 0.1)
        folder.add(patch(f"e1.v{step - 1}", now, f"e1.v{step}", step, after))
        for worker in workers:
            assert not apply(worker, folder, f"e1.v{step - 1}", f"e1.v{step}")
            fresh = Double(worker.model.rank, ranks, dtype)
            fresh.load_weights(after.items())
            for name, parameter in worker.model.named_parameters():
                assert raw(parameter) == raw(fresh.get_parameter(name)), f"{name} after step {step}"
            assert worker.mgrpo_info()["label"] == f"e1.v{step}"
        now = after
        if folder.patched(Label(1, step)) >= REBASE:
            folder.make_whole(Label(1, step))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) <= REBASE + KEEP


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Another base, a flipped byte, a file that ends early, another dtype: named, and the weights are as they were."""
    folder, worker = WeightFolder(tmp_path), Worker()
    now, after = state(0), moved(state(0), 1)
    assert not load(worker, folder, whole("e1.v0", 0, now))
    before = worker.bytes_held()
    folder.add(patch("e1.v0", now, "e1.v1", 1, after))
    (found,) = folder.patches("e1.v0", Label(1, 1)) or []
    assert "a patch of e1.v7 meets e1.v0" in apply(worker, folder, "e1.v0", "e1.v1", base="e1.v7")
    good = found.path.read_bytes()
    for damaged in (good[:-3], good[:40] + bytes([good[40] ^ 4]) + good[41:]):
        found.path.write_bytes(damaged)
        assert "are not the" in apply(worker, folder, "e1.v0", "e1.v1")
    found.path.write_bytes(good)
    low = Worker(Double(dtype=torch.bfloat16))
    assert not load(low, folder, whole("e1.v0", 0, now))
    error = apply(low, folder, "e1.v0", "e1.v1")
    assert "torch.float32" in error and "torch.bfloat16" in error and low.mgrpo_info()["label"] == "e1.v0"
    assert worker.bytes_held() == before and worker.mgrpo_info()["label"] == "e1.v0"
    assert not apply(worker, folder, "e1.v0", "e1.v1")
    assert worker.model.whole()["o.weight"].equal(after["o.weight"])


def test_a_loader_that_does_more_than_place_is_refused_by_name(tmp_path: Path) -> None:
    """It computes what it stores, or leaves some of it out: XOR of bits would be another weight."""

    class Scales(Double):
        def _load(self, name: str, tensor: torch.Tensor) -> None:
            super()._load(name, tensor * 2 if name == "k" else tensor)

    class Skips(Double):
        def _load(self, name: str, tensor: torch.Tensor) -> None:
            if name != "norm":
                super()._load(name, tensor)

    now, after = state(0), moved(state(0), 1, 1.0)
    for model, tensor, words in (
        (Scales(), "k.weight", "computes"),
        (Skips(), "norm.weight", "has not taken"),
    ):
        folder, worker = WeightFolder(tmp_path / tensor), Worker(model)
        assert not load(worker, folder, whole("e1.v0", 0, now))
        folder.add(patch("e1.v0", now, "e1.v1", 1, after))
        error = apply(worker, folder, "e1.v0", "e1.v1")
        assert tensor in error and words in error


def test_a_torn_model_holds_no_version_until_a_whole_one_comes(tmp_path: Path) -> None:
    """The model is not what its label says: the patch makes it something else, which the checksum of the result finds;
    from then on patches are refused, and a whole version repairs it."""
    folder, worker = WeightFolder(tmp_path), Worker()
    now, after = state(0), moved(state(0), 1)
    assert not load(worker, folder, whole("e1.v0", 0, now))
    worker.model.o.data[0, 0] += 1.0
    folder.add(patch("e1.v0", now, "e1.v1", 1, after))
    assert "o.weight: after the patch its bytes are not the trainer's" in apply(
        worker, folder, "e1.v0", "e1.v1"
    )
    assert worker.mgrpo_info()["label"] == ""
    assert "meets weights of no version" in apply(worker, folder, "e1.v0", "e1.v1")
    assert not worker.mgrpo_load(str(folder.make_whole(Label(1, 1))), "e1.v1")["error"]
    assert worker.model.whole()["o.weight"].equal(after["o.weight"])


def test_damage_to_a_whole_version_is_found_before_it_is_loaded(tmp_path: Path) -> None:
    """A flipped byte by name, a file cut off by its length, on the way into the folder and out of it."""
    folder, worker = WeightFolder(tmp_path), Worker()
    now = state(0)
    assert not load(worker, folder, whole("e1.v0", 0, now))
    before = worker.bytes_held()
    file = folder.make_whole(Label(1, 0))
    good = file.read_bytes()
    sums = np.fromfile(file.with_name(file.name + SUMS), "<u4")
    for damaged, words in (
        (good[:-1] + bytes([good[-1] ^ 1]), "is damaged"),
        (good[:-8], "its header announces"),
    ):
        file.write_bytes(damaged)
        assert words in str(worker.mgrpo_load(str(file), "e1.v0")["error"])
    assert worker.bytes_held() == before
    torn = Weights.of_bytes("e1.v1", 1, good[:-1] + bytes([good[-1] ^ 1]))
    torn.parts[0].sums = sums.astype(np.uint32)
    with pytest.raises(CorruptionError, match="arrived damaged"):
        folder.add(torn)
    assert not folder.whole(Label(1, 1)).exists() and not list(folder.path(Label(1, 1)).glob(".*"))


def test_a_version_is_made_whole_on_disk_from_patches(tmp_path: Path) -> None:
    """Bit for bit the file that would have come; a worker that skipped versions adds another way; what the newest is
    made of stays, the rest goes; a patch of a version that is not there is refused, and so is a damaged one."""
    folder = WeightFolder(tmp_path)
    states = [state(0)]
    folder.add(whole("e1.v0", 0, states[0]))
    for step in range(1, 7):
        states.append(moved(states[-1], step))
        folder.add(patch(f"e1.v{step - 1}", states[-2], f"e1.v{step}", step, states[-1]))
    folder.add(patch("e1.v3", states[3], "e1.v6", 6, states[6]))
    assert [p.base for p in folder.patches("e1.v0", Label(1, 6)) or []] == [
        "e1.v0",
        "e1.v1",
        "e1.v2",
        "e1.v3",
    ]
    file = folder.make_whole(Label(1, 6))
    assert file.read_bytes() == safetensors.torch.save(states[6])
    assert folder.patches("e1.v9", Label(1, 6)) is None
    folder.clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e1.v4", "e1.v5", "e1.v6"]
    with pytest.raises(CorruptionError, match=r"it changes e1\.v2, which is not in"):
        folder.add(patch("e1.v2", states[2], "e1.v7", 7, moved(states[2], 9)))
    folder.add(patch("e1.v6", states[6], "e1.v8", 8, moved(states[6], 8)))
    (bad,) = folder.patches("e1.v6", Label(1, 8)) or []
    raw_bytes = bytearray(bad.path.read_bytes())
    raw_bytes[16] ^= 1  # of the first checksum
    bad.path.write_bytes(raw_bytes)
    with pytest.raises(CorruptionError, match="are not the trainer's"):
        folder.make_whole(Label(1, 8))
    assert not folder.whole(Label(1, 8)).exists()
