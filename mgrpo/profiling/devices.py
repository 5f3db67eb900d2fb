"""What a device can do, by the name that its driver gives it, and the most memory that a process has held.

FLOP/s of dense products (no structured sparsity), as the vendors' data sheets have them:

    NVIDIA      A100, A30, A40, A10, L40S, L40, L4, H20 (data sheets); H100 SXM, PCIe and NVL, H200 SXM and NVL, GH200
                (Hopper data sheets); B200 of an HGX B200, GB200 (Blackwell data sheets, one GPU); GeForce RTX 4090 and
                3090 (Ada and Ampere GA102 white papers, products that add up in float32)
    AMD         Instinct MI300X, MI325X (CDNA 3 data sheets)

The sheets of Hopper and later print figures with sparsity, twice the dense ones. A device that is not in the table (a
CPU, a partition of a GPU, whatever is new) has no peak: a utilisation of it would be a guess.
"""

from __future__ import annotations

import contextlib
import math
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a plan looks a GPU up without torch
    import torch

Kind = Literal["bfloat16", "tf32", "float32"]
"""What products are computed in. float16 is as fast as bfloat16."""


@dataclass(frozen=True, slots=True)
class Peak:
    """TFLOP/s of dense products. tf32: float32 operands on tensor cores."""

    bfloat16: float
    tf32: float
    float32: float


PEAKS: dict[str, Peak] = {
    r"NVIDIA GB200\b": Peak(2500.0, 1250.0, 80.0),
    r"NVIDIA B200\b": Peak(2250.0, 1100.0, 75.0),
    r"NVIDIA H200 NVL\b": Peak(835.0, 418.0, 60.0),
    r"NVIDIA H200\b": Peak(989.0, 494.0, 67.0),
    r"NVIDIA H100 NVL\b": Peak(835.0, 418.0, 60.0),
    r"NVIDIA H100 PCIe\b": Peak(756.0, 378.0, 51.0),
    r"NVIDIA H100( 80GB HBM3| SXM5?)?$": Peak(989.0, 494.0, 67.0),
    r"NVIDIA GH200\b": Peak(989.0, 494.0, 67.0),
    r"NVIDIA H20$": Peak(148.0, 74.0, 44.0),
    r"NVIDIA A100\b": Peak(312.0, 156.0, 19.5),
    r"NVIDIA A30\b": Peak(165.0, 82.0, 10.3),
    r"NVIDIA A40\b": Peak(149.7, 74.8, 37.4),
    r"NVIDIA A10$": Peak(125.0, 62.5, 31.2),
    r"NVIDIA L40S\b": Peak(362.0, 183.0, 91.6),
    r"NVIDIA L40$": Peak(181.0, 90.5, 90.5),
    r"NVIDIA L4$": Peak(121.0, 60.0, 30.3),
    r"NVIDIA GeForce RTX 4090$": Peak(165.2, 82.6, 82.6),
    r"NVIDIA GeForce RTX 3090$": Peak(71.0, 35.6, 35.6),
    r"AMD Instinct MI300X\b": Peak(1307.4, 653.7, 163.4),
    r"AMD Instinct MI325X\b": Peak(1307.4, 653.7, 163.4),
}
"""By a pattern that the name begins with; the first that fits counts."""


def peak_flops(name: str, kind: Kind) -> float:
    """FLOP/s of a device by torch.cuda.get_device_name(); NaN where they are not known."""
    if "MIG" in name.split():
        return math.nan
    for pattern, peak in PEAKS.items():
        if re.match(pattern, name):
            return float(getattr(peak, kind)) * 1e12
    return math.nan


def peak_of(device: torch.device, dtype: str) -> float:
    """FLOP/s of the device that this process computes on, of products of a policy with this policy.dtype; NaN where
    they are not known."""
    if device.type != "cuda":
        return math.nan
    import torch

    kind: Kind = "bfloat16" if dtype == "bfloat16" else "float32"
    if kind == "float32" and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    return peak_flops(torch.cuda.get_device_name(device), kind)


class PeakMemory:
    """The most memory that was held: of tensors on a GPU; on a CPU resident pages of this process, by the kernel's
    high-water mark, which is that since the process began where the kernel does not set it back."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0.0

    def begin(self) -> None:
        """A step begins: from now on it counts anew, and what was held since the step before is kept."""
        self._before = self._now()
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def most(self) -> float:
        """Bytes, the most since the begin() before the last one."""
        return max(self._before, self._now())

    def _now(self) -> float:
        if self._device.type == "cuda":
            import torch

            return float(torch.cuda.max_memory_allocated(self._device))
        return float(_high_water())


def _high_water() -> int:
    """Bytes of VmHWM."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
