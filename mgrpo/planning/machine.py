"""How much memory this machine has, asked without torch: the launcher must not open a GPU that a trainer needs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_SMI_SECONDS = 20.0


def host_memory(swap: bool = False) -> float:
    """Bytes of main memory of this machine, or of the container that this process is in. swap: with swap space."""
    found = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, float(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found + (_swap() if swap else 0.0)


def _swap() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:"))


def gpu_memory() -> float | None:
    """Bytes of the largest GPU here; None where the driver's tool does not say."""
    try:
        found = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        return max(float(line) for line in found.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
