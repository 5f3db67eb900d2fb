"""A run before it starts: what each agent's trainer takes, whether that fits, and what to change where it does not."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgrpo.config import RunConfig, load_config, view_of
from mgrpo.config.run import AgentConfig
from mgrpo.environments.stages import load_staged
from mgrpo.errors import ConfigError
from mgrpo.model.mesh import check_mesh
from mgrpo.planning.assumptions import Assumptions, Gpu
from mgrpo.planning.machine import host_memory
from mgrpo.planning.process import process_bytes
from mgrpo.planning.speed import Split, split_of
from mgrpo.planning.step import Parameters, StepMemory, plan_step
from mgrpo.planning.traffic import Traffic, traffic_of
from mgrpo.weights.history import PATCHED


@dataclass(frozen=True, slots=True)
class Host:
    """Bytes of main memory on one machine with ranks of this agent."""

    ranks: int
    processes: float
    tensors: int
    """Of ranks that compute on the CPU."""
    checkpoint: int
    """Copies from which checkpoints are written while the next steps are taken."""
    publishing: int
    """Rank 0's copy of the newest version and, at most, patches."""

    @property
    def total(self) -> float:
        return self.processes + self.tensors + self.checkpoint + self.publishing


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """One policy and its trainer."""

    role: str
    model: str
    device: str
    ranks: int
    parameters: Parameters
    memory: StepMemory
    needed: float
    """Bytes of a rank's device (a GPU, or its share of main memory), with what is there beside the tensors: assumed on
    a GPU, measured on a CPU."""
    available: float
    host: Host
    host_available: float
    traffic: Traffic
    split: Split | None
    settings: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.available and self.host.total <= self.host_available


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change of the config, computed anew."""

    change: tuple[str, ...]
    """Overrides, as --set takes them."""
    needed: float
    fits: bool
    note: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may take. memory: bytes of a GPU; host: bytes of a machine."""

    gpu: Gpu
    memory: float
    host: float
    assumed: Assumptions


def plan_agent(config: RunConfig, role: str, limits: Limits) -> AgentPlan:
    """The policy of `role`. Raises ConfigError for one that cannot be trained."""
    view = view_of(config, role)
    policy = view.agent.policy
    with tempfile.TemporaryDirectory() as made:
        folder = view.agent.model
        if folder is None:
            load_staged(config).build_policy(role, config.seed, made)
        memory, parameters = plan_step(Path(folder or made), view, f"agents.{role}.model")
    traffic = traffic_of(config, view, parameters, limits.assumed)
    cuda = policy.device == "cuda"
    on_host = min(view.ranks, limits.assumed.gpus_per_host) if cuda else view.ranks
    process = limits.assumed.process if cuda else float(process_bytes())
    copied = memory.masters + memory.optimizer
    patches = round(traffic.version * PATCHED) if view.agent.engine.weights_dtype == "bfloat16" else 0
    host = Host(
        on_host,
        on_host * process,
        0 if cuda else on_host * memory.peak,
        on_host * copied,
        0 if view.agent.engine.direct else traffic.version + patches,
    )
    if cuda:
        needed = memory.peak * (1 + limits.assumed.fragmentation) + limits.assumed.context
    else:
        needed = memory.peak + process
    available = limits.memory if cuda else limits.host / view.ranks
    split = split_of(config, view, parameters, traffic, limits.gpu, limits.assumed) if cuda else None
    return AgentPlan(
        role, view.agent.model or "(the task's)", policy.device, view.ranks, parameters, memory, needed,
        available, host, limits.host, traffic, split, _settings(config, role),
    )  # fmt: skip


def _settings(config: RunConfig, role: str) -> str:
    """The settings that decide the memory."""
    policy, trainer = config.agents[role].policy, config.trainer
    words = [policy.device, policy.dtype, f"ranks {policy.ranks}", f"micro_batch {trainer.micro_batch}"]
    words.append(f"max_length {view_of(config, role).longest}")
    words += [
        f"{name} {n}" for name in ("tp", "ep", "cp", "replicate") if (n := getattr(policy.mesh, name)) > 1
    ]
    words += ["gradient_checkpointing"] if policy.gradient_checkpointing else []
    words += [f"last_layers {policy.last_layers}"] if policy.last_layers else []
    words += [f"lora rank {policy.lora.rank}"] if policy.lora.rank else []
    return ", ".join(words)


def planned_roles(config: RunConfig) -> tuple[str, ...]:
    """The agents whose policies train."""
    return tuple(role for role in config.policy_roles if not config.agents[role].frozen)


def suggest(path: Path, overrides: Sequence[str], role: str, limits: Limits) -> list[Suggestion]:
    """Changes in the order of what they cost, each computed: alone first, then those that change no number of the run
    together, then fewer trained weights. Ends with the first that fits after the harmless ones."""
    config = load_config(path, overrides)
    found: list[Suggestion] = []
    together: list[str] = []
    for change, note in _harmless(config, role, limits.assumed.gpus_per_host):
        found.append(_tried(path, overrides, role, limits, change, note))
        together += change
    if len(found) > 1 and not any(s.fits for s in found):
        found.append(_tried(path, overrides, role, limits, tuple(together), "all of these together"))
    if any(s.fits for s in found):
        return found
    rest = [c for c in together if ".ranks=" not in c and ".mesh.dp=" not in c]
    for fewer, note in _fewer_trained(config, role):
        found.append(_tried(path, overrides, role, limits, (*rest, *fewer), note))
        if found[-1].fits:
            break
    return found


def _harmless(config: RunConfig, role: str, per_host: int) -> list[tuple[tuple[str, ...], str]]:
    """Changes after which a run computes the same. per_host: GPUs of a host."""
    policy, trainer, where = config.agents[role].policy, config.trainer, f"agents.{role}.policy"
    out: list[tuple[tuple[str, ...], str]] = []
    if not policy.gradient_checkpointing:
        note = "the same numbers, a third more time in training"
        out.append(((f"{where}.gradient_checkpointing=true",), note))
    longest = max(agent.max_length for agent in config.agents.values())
    if trainer.micro_batch > longest:
        smaller = max(longest, trainer.micro_batch // 2)
        out.append(((f"trainer.micro_batch={smaller}",), "the same gradient, more passes"))
    if policy.device == "cuda":
        if (ep := _spread(config.agents[role], per_host)) > 1:
            note = "the same gradient; tokens go to experts, not experts to ranks"
            out.append(((f"{where}.mesh.ep={ep}",), note))
        more = [f"{where}.ranks={policy.ranks * 2}"]
        more += [f"{where}.mesh.dp={policy.mesh.dp * 2}"] if policy.mesh.dp else []
        out.append((tuple(more), "the same gradient on twice the GPUs"))
    return out


def _spread(agent: AgentConfig, per_host: int) -> int:
    """Ranks of one host that a mixture's experts can be spread over; 1 where they cannot, or are already."""
    policy = agent.policy
    mesh, inner = policy.mesh, policy.ranks // policy.mesh.replicate
    ep = min(per_host, inner)
    if agent.model is None or mesh.ep > 1 or inner % ep or ep % mesh.tp:
        return 1
    try:
        check_mesh(Path(agent.model), policy.model_copy(update={"mesh": mesh.model_copy(update={"ep": ep})}))
    except ConfigError:  # no mixture, no plan, or experts that do not divide
        return 1
    return ep


def _fewer_trained(config: RunConfig, role: str) -> list[tuple[tuple[str, ...], str]]:
    policy, where = config.agents[role].policy, f"agents.{role}.policy"
    if policy.lora.rank or policy.last_layers:
        return []
    attention = '["q_proj", "k_proj", "v_proj", "o_proj"]'
    return [
        ((f"{where}.last_layers=8",), "trains less: the last layers alone"),
        (
            (f"{where}.lora.rank=32", f"{where}.lora.targets={attention}"),
            "trains less: adapters on attention",
        ),
    ]


def _tried(
    path: Path, overrides: Sequence[str], role: str, limits: Limits, change: tuple[str, ...], note: str
) -> Suggestion:
    try:
        plan = plan_agent(load_config(path, [*overrides, *change]), role, limits)
    except ConfigError as error:
        return Suggestion(change, float("inf"), False, f"refused: {error}")
    return Suggestion(change, plan.needed, plan.fits, note)


def limits_of(gpu: Gpu, memory: float | None, host: float | None, assumed: Assumptions) -> Limits:
    """Limits with the GPU's own memory and this machine's where none is given."""
    return Limits(gpu, memory or gpu.memory, host or host_memory(), assumed)
