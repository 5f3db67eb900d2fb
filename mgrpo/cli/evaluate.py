"""`mgrpo eval`: accuracy of a run's policies on a split, before and after training, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

import torch
from rich.console import Console
from rich.table import Table

from mgrpo.config import AgentConfig, RunConfig
from mgrpo.engines.hf.engine import HfEngine
from mgrpo.environments.episode import Agent
from mgrpo.environments.lifetime import close_task
from mgrpo.environments.task import Split, Task
from mgrpo.errors import ConfigError
from mgrpo.model.loading import load_policy
from mgrpo.pipeline.play import Accuracy, evaluate
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.processes import load_run_task


def evaluate_run(run: Path, n: int, split: str, seed: int) -> None:
    """Print a table: policies before RL and after it, sampled and greedy, on n questions of `split`."""
    folder, config = RunFolder(run), recorded_run(run)
    if split not in get_args(Split):
        raise ConfigError(f"--split {split}: expected one of {', '.join(get_args(Split))}")
    if n < 1:
        raise ConfigError(f"--n {n}: expected at least 1")
    torch.set_num_threads(config.rollout.threads)
    table = Table("policies", "sampled", "greedy", "invocations per rollout", title=f"{split}, {n} questions")
    for name, kept in (("before RL", "start"), ("after RL", "final")):
        paths = policy_paths(config, folder, kept)
        if paths is None:
            table.add_row(name, "-", "-", "not trained yet")
            continue
        agents = load_agents(config.agents, config.rollout.slots, paths)
        sampled, greedy = asyncio.run(_accuracies(load_run_task(config), agents, split, n, seed))
        calls = {role: _mean_calls(histogram) for role, histogram in sampled.calls.items()}
        table.add_row(
            name,
            f"{sampled.mean:.3f}",
            f"{greedy.mean:.3f}",
            ", ".join(f"{role} {mean:.2f}" for role, mean in calls.items()),
        )
    Console().print(table)


def policy_paths(config: RunConfig, folder: RunFolder, kept: str) -> dict[str, Path] | None:
    """The policy folder of each role before ("start") or after ("final") RL; None when one is missing."""
    paths = {}
    for role in config.roles:
        path = policy_path(config, folder, role, kept)
        if path is None:
            return None
        paths[role] = path
    return paths


def policy_path(config: RunConfig, folder: RunFolder, role: str, kept: str) -> Path | None:
    """One role's policy before ("start") or after ("final") RL; a frozen one ends as it began. None: not there yet."""
    owner = config.policy_of(role)
    agent = config.agents[owner]
    path = folder.agent(owner) / ("start" if agent.frozen else kept)
    if path.name == "start" and agent.model is not None:
        path = Path(agent.model)
    return path if path.exists() else None


def load_agents(
    configs: Mapping[str, AgentConfig], slots: int, paths: Mapping[str, Path], *, greedy: bool = False
) -> dict[str, Agent]:
    """The agents of a run with the policies in the given folders, served in this process. slots: of rollout."""
    agents = {}
    for role, path in paths.items():
        policy, agent = load_policy(path), configs[role]
        engine = HfEngine(policy, slots=slots, max_length=agent.max_length)
        temperature = 0.0 if greedy else agent.loss.temperature
        agents[role] = Agent(role, engine, policy.tokenizer, temperature, agent.max_length)
    return agents


async def _accuracies(
    task: Task, agents: Mapping[str, Agent], split: str, n: int, seed: int
) -> tuple[Accuracy, Accuracy]:
    try:
        questions = task.questions(cast(Split, split), n)
        sampled = await evaluate(task, questions, agents, greedy=False, seed=seed)
        greedy = await evaluate(task, questions, agents, greedy=True, seed=seed)
    finally:
        await close_task(task)
        for agent_ in agents.values():
            await agent_.engine.close()
    return sampled, greedy


def _mean_calls(histogram: dict[int, int]) -> float:
    return sum(d * count for d, count in histogram.items()) / max(1, sum(histogram.values()))
