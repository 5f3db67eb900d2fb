"""slime as its interfaces are (Sample, DynamicFilterOutput, RolloutFn*Output, the reducer, the cut into steps), written
from its sources: what CI has of it. `slime_reducer` is slime's own, of the checkout that SLIME_CHECKOUT names."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

CHECKOUT = os.environ.get("SLIME_CHECKOUT", "")


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"


@dataclass
class Sample:
    group_index: int | str | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    reward: Any = None
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)

    Status = Status


@dataclass
class Output:
    """RolloutFnTrainOutput, RolloutFnEvalOutput and DynamicFilterOutput in one."""

    samples: Any = None
    data: Any = None
    metrics: Any = None
    keep: bool = True
    reason: str | None = None


def load_function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def install(monkeypatch: Any) -> None:
    """The modules of slime that the hooks import when they run."""
    for name in ("slime", "slime.rollout", "slime.rollout.base_types", "slime.rollout.filter_hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in {
        "slime.rollout.base_types": {"RolloutFnTrainOutput": Output, "RolloutFnEvalOutput": Output},
        "slime.rollout.filter_hub.base_types": {"DynamicFilterOutput": Output},
        "slime.utils.types": {"Sample": Sample},
        "slime.utils.misc": {"load_function": load_function},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


def reducer(
    total_lengths: list[int], response_lengths: list[int], loss_masks: list[Any], denominators: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """slime's get_sum_of_sample_mean without context parallelism."""

    def total(x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(response_lengths), loss_masks, denominators, strict=True)
        return torch.stack([(part * mask).sum() / d.clamp(min=1) for part, mask, d in parts]).sum()

    return total


@contextmanager
def slime_reducer() -> Iterator[Callable[..., Callable[[torch.Tensor], torch.Tensor]]]:
    """get_sum_of_sample_mean of the checkout, whose one import of Megatron gives the size of a group: 1."""
    names = ("megatron", "megatron.core", "megatron.core.mpu")
    before = {name: sys.modules.get(name) for name in names}
    modules = {name: ModuleType(name) for name in names}
    modules["megatron.core.mpu"].get_context_parallel_world_size = lambda: 1  # type: ignore[attr-defined]
    modules["megatron.core"].mpu = modules["megatron.core.mpu"]  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        path = Path(CHECKOUT) / "slime/backends/megatron_utils/cp_utils.py"
        spec = importlib.util.spec_from_file_location("slime_cp_utils", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.get_sum_of_sample_mean
    finally:
        for name, module_before in before.items():
            sys.modules.pop(name)
            if module_before is not None:
                sys.modules[name] = module_before


def steps(rollout_ids: list[int], size: int) -> list[list[int]]:
    """Which samples each optimizer step has: slime's build_dp_schedule on one rank."""
    order = list(dict.fromkeys(rollout_ids))
    cuts = [order[i : i + size] for i in range(0, len(order) // size * size, size)]
    return [[j for j, rollout in enumerate(rollout_ids) if rollout in cut] for cut in cuts]


def slime_steps(rollout_ids: list[int], size: int) -> list[list[int]]:
    """`steps` by the checkout's own build_dp_schedule."""
    sys.path.insert(0, CHECKOUT)
    try:
        schedule = importlib.import_module("slime.utils.dp_schedule").build_dp_schedule
    finally:
        sys.path.remove(CHECKOUT)
        for name in [n for n in sys.modules if n == "slime" or n.startswith("slime.")]:
            del sys.modules[name]
    names = ("use_dynamic_batch_size", "balance_by_flops", "balance_data")
    args = SimpleNamespace(**dict.fromkeys(names, False), micro_batch_size=1)
    parallel = {"dp_size": 1, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    lengths = [1] * len(rollout_ids)
    parts, _, counts, _ = schedule(
        args, parallel, lengths, global_batch_size=size, rollout_indices=rollout_ids
    )
    taken = iter(parts[0])
    return [[next(taken) for _ in range(count)] for count in counts]


def flat(samples: Any) -> list[Sample]:
    """Nested lists of samples as one, as slime does before it converts them."""
    return [s for part in samples for s in flat(part)] if isinstance(samples, list) else [samples]
