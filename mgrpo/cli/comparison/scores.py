"""Held-out scores, question by question: sampled rollouts and a greedy one of each, kept in a file and never repeated.

The questions and the sampling noise are the same for every team of policies, so differences are paired. A question's
score is the mean over its rollouts; those that failed are in no mean and are counted beside, and a question of which
none is left has no score (null).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgrpo.cli.comparison.jobs import run_folder
from mgrpo.cli.comparison.variants import Score
from mgrpo.cli.evaluate import load_agents, policy_path
from mgrpo.environments.comparison import MODES, mean_of
from mgrpo.environments.episode import Agent, mix
from mgrpo.environments.lifetime import close_task
from mgrpo.environments.task import Task
from mgrpo.files import remove_partials, write_atomic
from mgrpo.pipeline.evaluations import EVAL_SEED
from mgrpo.pipeline.play import Accuracy, RolloutResult, evaluate
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.processes import load_run_task


def score_file(out: Path, seed: int, score: Score) -> Path:
    return out / "scores" / f"seed-{seed}" / f"{score.name.replace(' ', '-')}.json"


def score(
    out: Path, seed: int, wanted: Score, n: int, repeats: int, log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The score on n questions as recorded, or computed now with `repeats` sampled rollouts of each; None when a policy
    it needs does not exist."""
    path = score_file(out, seed, wanted)
    known = _read(path)
    if (known.get("n"), known.get("repeats", 1)) == (n, repeats):
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
    result = asyncio.run(_play(load_run_task(config), agents, n, repeats))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    write_atomic(path, json.dumps(result))
    means = ", ".join(f"{mode} {mean_of(np.array(result[mode], float)):.3f}" for mode in MODES)
    log(f"seed {seed}, {wanted.name}: held-out {means}")
    return result


def _read(path: Path) -> dict[str, Any]:
    """A score that was kept; {} where there is none that can be read: it is computed again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


async def _play(task: Task, agents: Mapping[str, Agent], n: int, repeats: int) -> dict[str, Any]:
    try:
        result: dict[str, Any] = {"n": n, "repeats": repeats}
        questions = task.questions("heldout", n)
        for mode in MODES:
            played = _Played([[] for _ in questions], [[] for _ in questions])
            for repeat in range(repeats if mode == "sampled" else 1):
                seed = mix(EVAL_SEED, repeat) if repeat else EVAL_SEED
                played.add(
                    await evaluate(
                        task,
                        questions,
                        agents,
                        greedy=mode == "greedy",
                        seed=seed,
                        seen=played.seen,
                        place=f"heldout/{repeat}",
                    )
                )
            result |= {mode: means_of(played.correct), f"failed_{mode}": played.failed}
            if played.known_world:
                result[f"real_{mode}"] = means_of(played.real)
            if mode == "sampled":
                result["d_k"] = {r: {str(d): c for d, c in h.items()} for r, h in played.calls.items()}
        return result
    finally:
        await close_task(task)
        for agent in agents.values():
            await agent.engine.close()


@dataclass
class _Played:
    """The outcomes of each question, rollout by rollout. real: whether the answer is the real world's, of a task that
    says what that is."""

    correct: list[list[float]]
    real: list[list[float]]
    known_world: bool = False
    failed: int = 0
    calls: dict[str, Counter[int]] = field(default_factory=dict)

    def seen(self, number: int, result: RolloutResult) -> None:
        if result.rollout is None:
            return
        truth = result.rollout.info.get("real_answer")
        self.known_world |= truth is not None
        self.correct[number].append(result.rollout.correct)
        self.real[number].append(float(truth is not None and result.rollout.info.get("answer") == truth))

    def add(self, accuracy: Accuracy) -> None:
        self.failed += accuracy.failed
        for role, histogram in accuracy.calls.items():
            self.calls.setdefault(role, Counter()).update(histogram)


def means_of(outcomes: Sequence[Sequence[float]]) -> list[float | None]:
    """Of each question, over its rollouts; None without one."""
    return [sum(rollouts) / len(rollouts) if rollouts else None for rollouts in outcomes]
