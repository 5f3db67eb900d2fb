"""Peaks of devices by the names that drivers give them: never that of another device."""

from __future__ import annotations

import math

import pytest
import torch

from mgrpo.profiling.devices import PEAKS, PeakMemory, peak_flops, peak_of


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_known_device_has_its_data_sheets_peak(name: str, tflops: float) -> None:
    """Dense bfloat16 products, and slower ones in float32."""
    assert peak_flops(name, "bfloat16") == tflops * 1e12
    assert peak_flops(name, "bfloat16") >= 1.9 * peak_flops(name, "tf32") > 0
    assert peak_flops(name, "tf32") >= peak_flops(name, "float32") > 0


@pytest.mark.parametrize(
    "name",
    [
        *(
            "cpu",
            "",
            "NVIDIA A10G",
            "NVIDIA L400",
            "NVIDIA RTX 6000 Ada Generation",
            "NVIDIA Graphics Device",
        ),
        *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H1000"),
        *("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "Not an NVIDIA H100"),
    ],
)
def test_an_unknown_device_has_none(name: str) -> None:
    """A name that only looks alike, and a partition of a GPU that is known."""
    assert math.isnan(peak_flops(name, "bfloat16"))


def test_every_peak_is_dense_and_in_order() -> None:
    """bfloat16 is never slower than TF32, nor TF32 than float32, and none is a figure with sparsity or of a unit that
    slipped."""
    for peak in PEAKS.values():
        assert 3000 > peak.bfloat16 > peak.tf32 >= peak.float32 > 5


def test_a_cpu_has_no_peak() -> None:
    """So no utilisation of it is ever shown."""
    assert math.isnan(peak_of(torch.device("cpu"), "float32"))


def test_memory_at_its_highest_is_seen_after_it_is_freed() -> None:
    """64 MiB that were held for a moment are in the figure of this step and, as what was held since it began, of the
    next one."""
    size = 64 << 20
    memory = PeakMemory(torch.device("cpu"))
    memory.begin()
    memory.begin()
    before = memory.most()
    held = torch.ones(size, dtype=torch.uint8)
    assert int(held.sum(dtype=torch.int64)) == size
    del held
    assert memory.most() > before + 0.9 * size
    memory.begin()
    assert memory.most() > before + 0.9 * size
