"""slime as its interfaces are (Sample, DynamicFilterOutput, RolloutFn*Output, the reducer, the cut into steps), written
from its sources: what CI has of it. `slime_modules` are slime's own, of the checkout that SLIME_CHECKOUT names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
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


class _OneRank(ModuleType):
    """megatron.core.mpu where every group has one rank."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda **_: 1 if name.endswith("world_size") else None


def slime_modules(monkeypatch: Any) -> tuple[Any, Any]:
    """slime's own loss.py and dp_schedule.py of the checkout. Stubbed are Megatron and slime's
    HTTP; the log-probs and entropies of logits, for which it has kernels over ranks, are plain torch."""
    mpu = _OneRank("megatron.core.mpu")
    core = ModuleType("megatron.core")
    core.__dict__["mpu"] = mpu
    http = ModuleType("slime.utils.http_utils")
    http.__dict__["is_port_available"] = None
    package = ModuleType("slime.backends.megatron_utils")  # its own __init__ imports Megatron's model
    package.__path__ = [str(Path(CHECKOUT, "slime/backends/megatron_utils"))]
    modules = {"megatron": ModuleType("megatron"), "megatron.core": core, "megatron.core.mpu": mpu}
    modules |= {"slime.utils.http_utils": http, "slime.backends.megatron_utils": package}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(CHECKOUT)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda f: f)
    loss = importlib.import_module("slime.backends.megatron_utils.loss")
    schedule = importlib.import_module("slime.utils.dp_schedule")
    for name in [n for n in sys.modules if (n == "slime" or n.startswith("slime.")) and n not in modules]:
        del sys.modules[name]

    def log_probs(logits: torch.Tensor, tokens: torch.Tensor, *_: Any, **__: Any) -> Any:
        p = logits.log_softmax(-1)
        return p.gather(-1, tokens[:, None]), -(p.exp() * p).sum(-1)

    loss.calculate_log_probs_and_entropy = log_probs
    return loss, schedule


def steps(rollout_ids: list[int], size: int) -> list[list[int]]:
    """Which samples each optimizer step has: slime's build_dp_schedule on one rank."""
    order = list(dict.fromkeys(rollout_ids))
    cuts = [order[i : i + size] for i in range(0, len(order) // size * size, size)]
    return [[j for j, rollout in enumerate(rollout_ids) if rollout in cut] for cut in cuts]


def slime_steps(schedule: Any, rollout_ids: list[int], size: int) -> list[list[int]]:
    """`steps` by slime's own build_dp_schedule."""
    names = ("use_dynamic_batch_size", "balance_by_flops", "balance_data")
    args = SimpleNamespace(**dict.fromkeys(names, False), micro_batch_size=1)
    parallel = {"dp_size": 1, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1}
    build = schedule.build_dp_schedule
    parts, _, counts, _ = build(
        args, parallel, [1] * len(rollout_ids), global_batch_size=size, rollout_indices=rollout_ids
    )
    taken = iter(parts[0])
    return [[next(taken) for _ in range(count)] for count in counts]


def flat(samples: Any) -> list[Sample]:
    """Nested lists of samples as one, as slime does before it converts them."""
    return [s for part in samples for s in flat(part)] if isinstance(samples, list) else [samples]
