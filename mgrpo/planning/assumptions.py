"""What a plan takes for granted: GPUs' data sheets, and guesses that only a run can replace. All stand on the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mgrpo.errors import ConfigError
from mgrpo.profiling.devices import peak_flops

GB = 10**9
GIB = 2**30
_UNITS = {"GB": GB, "GIB": GIB, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class Gpu:
    """name, bytes of memory, dense bfloat16 FLOP/s, bytes/s of its memory: from the data sheet."""

    name: str
    memory: float
    flops: float
    bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * GB, peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16"), 2.0e12),
        Gpu("h100", 80 * GB, peak_flops("NVIDIA H100 80GB HBM3", "bfloat16"), 3.35e12),
        Gpu("h200", 141 * GB, peak_flops("NVIDIA H200", "bfloat16"), 4.8e12),
        Gpu("b200", 180 * GB, peak_flops("NVIDIA B200", "bfloat16"), 8.0e12),
    )
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Changed by --assume NAME=VALUE."""

    context: float = 1.5 * GB
    """Bytes of a GPU that CUDA and NCCL take beside the tensors."""
    fragmentation: float = 0.05
    """Of the peak, lost between blocks of the allocator."""
    process: float = 3.0 * GB
    """Main memory of one rank's process on a GPU beside what is listed. That of ranks on the CPU is measured."""
    gpus_per_host: int = 8
    mean_length: float = 0.5
    """Mean trajectory, of max_length."""
    sampled: float = 0.5
    """Of a trajectory's tokens, sampled by its policy."""
    train_mfu: float = 0.35
    """Of the FLOP/s, reached in training."""
    decode_share: float = 0.5
    """Of the memory bandwidth, reached in decoding."""
    link: float = 1.0 * GB
    """Bytes/s at which weights reach a server."""
    within: float = 300.0 * GB
    """Bytes/s of a GPU's collectives within a host."""
    between: float = 40.0 * GB
    """Bytes/s of a GPU's collectives between hosts."""


def assume(changes: Sequence[str]) -> Assumptions:
    """The defaults with changes such as "train_mfu=0.4". Raises ConfigError."""
    names = {field.name for field in dataclasses.fields(Assumptions)}
    found: dict[str, float] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in names or not number >= 0:
            raise ConfigError(
                f"--assume {change!r}: expected NAME=NUMBER >= 0 with one of {', '.join(sorted(names))}"
            )
        found[name] = number
    if (per_host := found.pop("gpus_per_host", None)) is not None:
        if per_host < 1 or per_host != int(per_host):
            raise ConfigError(f"--assume gpus_per_host={per_host:g}: expected a whole number >= 1")
        return Assumptions(**found, gpus_per_host=int(per_host))
    return Assumptions(**found)  # type: ignore[arg-type]


def memory_of(text: str, option: str) -> float:
    """Bytes of "80GB" (10^9) or "80GiB" (2^30). Raises ConfigError naming the option."""
    cleaned = text.strip().upper()
    for unit, size in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if cleaned.endswith(unit):
            try:
                value = float(cleaned.removesuffix(unit)) * size
            except ValueError:
                break
            if 0 < value < float("inf"):
                return value
            break
    raise ConfigError(f"{option} {text!r}: expected a size such as 80GB or 80GiB")
