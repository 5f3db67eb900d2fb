"""Held-out scores, question by question: one sampled and one greedy rollout of each, kept in a file and never repeated.

The questions and the sampling noise are the same for every pair of policies, so differences are paired.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mgrpo.cli.comparison.jobs import run_folder
from mgrpo.cli.comparison.variants import Score
from mgrpo.cli.evaluate import load_agents, policy_path
from mgrpo.environments.episode import Agent
from mgrpo.environments.lifetime import close_task
from mgrpo.environments.task import Task
from mgrpo.files import remove_partials, write_atomic
from mgrpo.pipeline.evaluations import EVAL_SEED
from mgrpo.pipeline.play import RolloutResult, evaluate
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.processes import load_run_task


def score_file(out: Path, seed: int, score: Score) -> Path:
    return out / "scores" / f"seed-{seed}" / f"{score.name.replace(' ', '-')}.json"


def score(out: Path, seed: int, wanted: Score, n: int, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The score as recorded, or computed now; None when a policy it needs does not exist."""
    path = score_file(out, seed, wanted)
    known = _read(path)
    if known.get("n") == n:
        return known
    paths = {}
    for role, (variant, kept) in wanted.policies.items():
        run = run_folder(out, seed, variant)
        folder = policy_path(recorded_run(run), RunFolder(run), role, kept) if run.exists() else None
        if folder is None:
            return None
        paths[role] = folder
    config = recorded_run(run_folder(out, seed, next(iter(wanted.policies.values()))[0]))
    torch.set_num_threads(config.rollout.threads)
    config = config.model_copy(update={"task": config.task.with_options(wanted.options)})
    agents = load_agents(config.agents, config.rollout.slots, paths)
    result = asyncio.run(_play(load_run_task(config), agents, n))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    write_atomic(path, json.dumps(result))
    means = ", ".join(f"{mode} {sum(result[mode]) / n:.3f}" for mode in ("sampled", "greedy"))
    log(f"seed {seed}, {wanted.name}: held-out {means}")
    return result


def _read(path: Path) -> dict[str, Any]:
    """A score that was kept; {} where there is none that can be read: it is computed again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


async def _play(task: Task, agents: Mapping[str, Agent], n: int) -> dict[str, Any]:
    try:
        return await _outcomes(task, agents, n)
    finally:
        await close_task(task)
        for agent in agents.values():
            await agent.engine.close()


async def _outcomes(task: Task, agents: Mapping[str, Agent], n: int) -> dict[str, Any]:
    questions = task.questions("heldout", n)
    result: dict[str, Any] = {"n": n}
    for mode in ("sampled", "greedy"):
        outcomes, real = [0.0] * n, [0.0] * n
        known_world = False

        def seen(
            number: int, result: RolloutResult, outcomes: list[float] = outcomes, real: list[float] = real
        ) -> None:
            nonlocal known_world
            if result.rollout is None:
                return
            outcomes[number] = result.rollout.correct
            truth = result.rollout.info.get("real_answer")
            known_world |= truth is not None
            real[number] = float(truth is not None and result.rollout.info.get("answer") == truth)

        accuracy = await evaluate(task, questions, agents, greedy=mode == "greedy", seed=EVAL_SEED, seen=seen)
        result[mode] = outcomes
        result[f"failed_{mode}"] = accuracy.failed
        if known_world:
            result[f"real_{mode}"] = real
        if mode == "sampled":
            result["d_k"] = {role: {str(d): c for d, c in h.items()} for role, h in accuracy.calls.items()}
    return result
