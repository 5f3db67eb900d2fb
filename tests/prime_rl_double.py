"""prime-rl as its interfaces are: the Algorithm and the train sink of its orchestrator, its loss. `install(real=False)`
puts a double of them in sys.modules, written from its sources, which is what CI has. With real=True the files of the
checkout that PRIME_RL_CHECKOUT names are loaded themselves, and only what they import from elsewhere (configs,
verifiers, type checkers, loggers) is stubbed. Episodes are plain objects in the form of verifiers'."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

CHECKOUT = os.environ.get("PRIME_RL_CHECKOUT", "")
LOADED = (
    "prime_rl.orchestrator.algo", "prime_rl.orchestrator.algo.base", "prime_rl.orchestrator.algo.routing",
    "prime_rl.orchestrator.algo.grpo", "prime_rl.orchestrator.algo.max_rl", "prime_rl.orchestrator.train_sink",
    "prime_rl.orchestrator.trajectories",
    "prime_rl.transports.rollouts.types", "prime_rl.trainer.rl.loss",
)  # fmt: skip
"""Modules whose code is prime-rl's own when the checkout is there."""


class Branch:
    """One path through a trace: here the only one."""

    multi_modal_data = routed_experts = reference_logprobs = None

    def __init__(self, nodes: list[Any]) -> None:
        self.nodes = nodes
        self.token_ids = [token for node in nodes for token in node.token_ids]
        self.logprobs = [x for node in nodes for x in node.logprobs]

    @property
    def advantages(self) -> list[float]:
        found: list[float] = []
        for node in self.nodes:
            values = iter(node.advantages or [])
            found += [next(values, 0.0) if trained else 0.0 for trained in node.mask]
        return found


class Trace:
    has_error = False

    def __init__(self, name: str, agent: str, reward: float, nodes: list[Any]) -> None:
        self.id, self.reward, self.nodes = name, reward, nodes
        self.agent = SimpleNamespace(name=agent, trainable=True)
        self.task = SimpleNamespace(data=SimpleNamespace(idx=0))
        self.num_total_tokens = sum(len(node.token_ids) for node in nodes)

    @property
    def branches(self) -> list[Branch]:
        return [Branch(self.nodes)]


class Episode:
    ok = True

    def __init__(self, name: str, group: int, traces: list[Trace]) -> None:
        self.id, self.traces = name, traces
        self.env, self.group = SimpleNamespace(name="team"), SimpleNamespace(id=str(group))
        self.task = SimpleNamespace(data=SimpleNamespace(idx=group))
        self.run = SimpleNamespace(work=SimpleNamespace(step=3, policy=None))
        self.num_total_tokens = sum(trace.num_total_tokens for trace in traces)

    def model_copy(self, update: dict[str, Any]) -> Episode:
        return Episode(self.id, int(self.group.id), update["traces"])


def node(token_ids: list[int], mask: list[int], logprobs: list[float]) -> Any:
    return SimpleNamespace(
        token_ids=token_ids, mask=[bool(m) for m in mask], logprobs=logprobs, advantages=None, loss_weights=None,
        sampled=any(mask), reference_logprobs=None,
    )  # fmt: skip


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def compute_loss(
    *, trainer_logprobs: Any, inference_logprobs: Any, ref_logprobs: Any, advantages: Any, loss_mask: Any,
    rl_weights: Any, rl_loss_fn: Any, rl_scale: int, **_: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:  # fmt: skip
    """The rl component of prime-rl's."""
    total = trainer_logprobs[0].sum() * 0.0
    for j, (logp, mask, weights) in enumerate(zip(trainer_logprobs, loss_mask, rl_weights, strict=True)):
        seen = mask & (weights != 0)
        if bool(seen.any()):
            ref = None if ref_logprobs is None else ref_logprobs[j]
            inputs = LossInputs(logp, inference_logprobs[j], ref, advantages[j], seen, weights)
            total = total + rl_loss_fn(inputs).loss
    return total / rl_scale, {}


class Algorithm:
    action_loss_type = "rl"

    def __init__(self, config: Any, policy_pool: Any) -> None:
        self.policy_pool = policy_pool

    async def finalize_group(self, episodes: list[Episode]) -> None:
        await self.score_group(episodes)

    async def score_group(self, episodes: list[Episode]) -> None: ...


class Distillation(Algorithm):
    action_loss_type = "ce"


def iter_trainable_traces(episodes: Sequence[Episode]) -> Any:
    for episode in episodes:
        for trace in episode.traces:
            if not trace.has_error and any(any(n.mask) for n in trace.nodes):
                yield episode, trace


def assign_advantages(trace: Trace, value: float) -> None:
    for n in trace.nodes:
        n.advantages = [float(value)] * sum(n.mask)


@dataclass
class TrainingSample:
    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    advantages: list[float]
    rl_weights: list[float] | None


@dataclass
class TrainSink:
    """Groups to batches of `batch_size` traces; tokens whose advantage is 0 leave the rl weights."""

    config: Any
    train_envs: Any
    batch_size: int
    pending_batch: dict[str, list[TrainingSample]] = field(default_factory=dict)
    groups: dict[str, list[Episode]] = field(default_factory=dict)

    async def add(self, episode: Episode) -> Any:
        group = self.groups.setdefault(episode.group.id, [])
        group.append(episode)
        env = self.train_envs.get(episode.env.name)
        if len(group) < env.config.group_size:
            return None
        await env.algorithm.finalize_group(self.groups.pop(episode.group.id))
        for _, trace in iter_trainable_traces(group):
            (branch,) = trace.branches
            weights = [
                w for n in branch.nodes for w in (n.loss_weights or {}).get("rl", [0.0] * len(n.token_ids))
            ]
            mask = [m for n in branch.nodes for m in n.mask]
            self.pending_batch[trace.id] = [
                TrainingSample(
                    branch.token_ids,
                    mask,
                    branch.logprobs,
                    branch.advantages,
                    weights if any(weights) else None,
                )
            ]
        return self.process_batch() if len(self.pending_batch) >= self.batch_size else None

    def process_batch(self) -> Any:
        samples = []
        for name in list(self.pending_batch)[: self.batch_size]:
            (sample,) = self.pending_batch.pop(name)
            weights = sample.rl_weights or [float(m) for m in sample.mask]
            rows = zip(weights, sample.mask, sample.advantages, strict=True)
            sample.rl_weights = [w if m and a else (0.0 if m else w) for w, m, a in rows]
            if any(w and m for w, m in zip(sample.rl_weights, sample.mask, strict=True)):
                samples.append(sample)
        return SimpleNamespace(samples=samples)


class Shape:
    """What Float[Tensor, "seq"] of jaxtyping becomes."""

    def __class_getitem__(cls, item: Any) -> Any:
        return torch.Tensor


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The checkout's own modules, and stubs for all else that they import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name in LOADED:
            own = Path(CHECKOUT, "src", *name.split("."))
            file = own / "__init__.py" if own.is_dir() else own.with_suffix(".py")
            inside = [str(own)] if own.is_dir() else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
        if name.split(".")[0] in ("prime_rl", "verifiers", "renderers", "beartype", "jaxtyping"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(_KNOWN.get(module.__name__, {}))


class _Stub(ModuleType):
    """Every name is a class, for annotations and base classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"action_loss_type": "rl", "length_penalty": None})
        setattr(self, name, made)
        return made


_KNOWN: dict[str, dict[str, Any]] = {
    "jaxtyping": {"Float": Shape, "Bool": Shape, "Int": Shape, "jaxtyped": lambda **_: lambda f: f},
    "beartype": {"beartype": lambda f: f},
    "prime_rl.utils.logger": {"get_logger": MagicMock()},
    "prime_rl.orchestrator.metrics": {"TrainEpisodes": MagicMock()},
    "prime_rl.orchestrator.types": {"TrainBatch": SimpleNamespace},
    "prime_rl.orchestrator.utils": {
        "episode_env_name": lambda episode: episode.env.name,
        "episode_group_id": lambda episode: episode.group.id,
        "min_fresh_version": lambda step, most: 0,
        "train_work": lambda episode: episode.run.work,
    },
}


def install(monkeypatch: Any, real: bool) -> SimpleNamespace:
    """prime-rl in sys.modules until the test ends: what a test needs of it."""
    for name in [n for n in sys.modules if n.split(".")[0] == "prime_rl"]:
        monkeypatch.delitem(sys.modules, name)
    if real:
        before = set(sys.modules)
        monkeypatch.setattr(torch, "compile", lambda **_: lambda f: f)
        monkeypatch.setattr(sys, "meta_path", [_Finder(), *sys.meta_path])
        rollouts = importlib.import_module("prime_rl.transports.rollouts")
        types = importlib.import_module("prime_rl.transports.rollouts.types")
        rollouts.__dict__["TrainingSample"] = types.TrainingSample
        for name in LOADED:
            importlib.import_module(name)
        for name in set(sys.modules) - before:  # so that monkeypatch takes them out again
            module = sys.modules.pop(name)
            monkeypatch.setitem(sys.modules, name, module)
    else:
        members: dict[str, dict[str, Any]] = {
            "prime_rl": {}, "prime_rl.orchestrator": {}, "prime_rl.trainer": {}, "prime_rl.trainer.rl": {},
            "prime_rl.orchestrator.algo": {
                "Algorithm": Algorithm, "assign_advantages": assign_advantages,
                "ALGORITHM_CLASSES": {"grpo": type("GRPO", (Algorithm,), {}), "max_rl": type("MaxRL", (Algorithm,), {}),
                                      "sft": Distillation},
            },
            "prime_rl.orchestrator.algo.base": {"iter_trainable_traces": iter_trainable_traces},
            "prime_rl.orchestrator.train_sink": {"TrainSink": type("TrainSink", (TrainSink,), {})},
            "prime_rl.trainer.rl.loss": {"LossInputs": LossInputs, "LossOutputs": LossOutputs,
                                         "compute_loss": compute_loss},
        }  # fmt: skip
        for name, content in members.items():
            module = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
    find = sys.modules.__getitem__
    loss = find("prime_rl.trainer.rl.loss")
    return SimpleNamespace(
        algo=find("prime_rl.orchestrator.algo"), TrainSink=find("prime_rl.orchestrator.train_sink").TrainSink,
        compute_loss=loss.compute_loss, LossInputs=loss.LossInputs, real=real,
    )  # fmt: skip
