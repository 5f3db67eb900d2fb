"""What each variant's runs cost, from their metrics, and what their named evaluation sets gave.

Rollouts are held equal: every run takes the same steps of as many questions and rollouts of each. Tokens are not: a
team samples in several roles, a single agent in one. Both are shown, so that a gain can be held against its cost.

    rollouts   that were trained on: steps x trainer.questions x trainer.group_size, less the failed ones. With
               trainer.oversample these are of all the groups that a step claimed: too few rollouts may be shown
    tokens     that policies sampled in training, by role, frozen ones included; in rollouts that did not fail and were
               reported. Evaluations, prompts, and what tools and other agents gave are no part of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.cli.comparison.verdict import root_mean_square
from mgrpo.config import RunConfig
from mgrpo.environments.comparison import BEFORE_RL, COTRAIN
from mgrpo.metrics import read_metrics
from mgrpo.pipeline.rollout_metrics import SAMPLED
from mgrpo.run.folder import recorded_run
from mgrpo.run.summary import read_summary

Runs = Mapping[str, Mapping[int, Path]]
"""Variant -> seed -> folder of its finished run."""


def held_equal(config: RunConfig) -> str:
    """The sentence that says what all variants have in common."""
    t = config.trainer
    return (
        f"Held equal: rollouts, {t.steps} steps x {t.questions} questions x {t.group_size} rollouts = "
        f"{t.steps * t.questions * t.group_size} a run. Tokens are not held equal."
    )


def spent(run: Path) -> dict[str, Any]:
    """{"rollouts": trained on, "tokens": role -> sampled in training} of a finished run; a role without a count (a run
    of an earlier version) has none."""
    config = recorded_run(run)
    trainer, role = config.trainer, config.training_roles[0]
    failed: dict[int, float] = {}
    tokens: dict[str, int] = {}
    for record in read_metrics(run):
        if (lost := record.get(f"{role}/rollouts/failed")) is not None:
            failed[int(record["step"])] = lost  # a step that was trained again counts once
        for name, value in record.items():
            if name.startswith(SAMPLED) and value is not None:
                of = name.removeprefix(SAMPLED)
                tokens[of] = tokens.get(of, 0) + int(value)
    a_step = trainer.questions * trainer.group_size
    rollouts = sum(max(0, a_step - int(lost)) for lost in failed.values())
    return {"rollouts": rollouts, "tokens": {r: tokens[r] for r in config.roles if r in tokens}}


def costs(runs: Runs) -> list[dict[str, Any]]:
    """One row a variant: means over its runs. of_cotrain: its tokens by those of co-training."""
    rows: list[dict[str, Any]] = []
    for name, by_seed in runs.items():
        found = [spent(run) for run in by_seed.values()]
        if not found:
            continue
        roles = list(dict.fromkeys(role for one in found for role in one["tokens"]))
        tokens = {role: float(np.mean([one["tokens"].get(role, 0) for one in found])) for role in roles}
        rollouts = float(np.mean([one["rollouts"] for one in found]))
        rows.append({"name": name, "rollouts": rollouts, "tokens": tokens, "total": sum(tokens.values())})
    base = next((row["total"] for row in rows if row["name"] == COTRAIN), 0.0)
    for row in rows:
        row["of_cotrain"] = row["total"] / base if base else None
    return rows


def cost_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and rows in words."""
    roles = list(dict.fromkeys(role for row in rows for role in row["tokens"]))
    head = ["variant", "rollouts trained on", "sampled tokens", *roles, "of co-training's"]
    lines = [head]
    for row in rows:
        known = bool(row["tokens"])
        each = [f"{row['tokens'][role]:,.0f}" if role in row["tokens"] else "-" for role in roles]
        share = "-" if row["of_cotrain"] is None or not known else f"{row['of_cotrain']:.2f}"
        lines.append(
            [row["name"], f"{row['rollouts']:,.0f}", f"{row['total']:,.0f}" if known else "-", *each, share]
        )
    return lines


def evaluations(runs: Runs) -> list[dict[str, Any]]:
    """One row a named evaluation set and variant, as the runs themselves played it at their end, and co-training's
    before RL: avg@repeats, mean and spread over seeds, and the standard error over the questions of a typical seed."""
    rows = []
    teams = [
        (BEFORE_RL, runs.get(COTRAIN, {}), min),
        *((name, by_seed, max) for name, by_seed in runs.items()),
    ]
    for name, by_seed, which in teams:
        found: dict[str, list[Mapping[str, float]]] = {}
        repeats: dict[str, int] = {}
        for run in by_seed.values():
            repeats |= {s.name: s.repeats for s in recorded_run(run).eval.sets}
            for label, steps in read_summary(run).get("sets", {}).items():
                figures = steps[which(steps, key=int)] if steps else {}
                if "avg" in figures:
                    found.setdefault(label, []).append(figures)
        for label, each in found.items():
            averages = [figures["avg"] for figures in each]
            rows.append({
                "set": label, "name": name, "repeats": repeats[label], "mean": float(np.mean(averages)),
                "std_over_seeds": float(np.std(averages, ddof=1)) if len(averages) > 1 else 0.0,
                "stderr": root_mean_square([figures.get("stderr") for figures in each]), "by_seed": averages,
            })  # fmt: skip
    return sorted(rows, key=lambda row: row["set"])


def heldout(table: Sequence[Mapping[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """The same of the held-out questions, from the comparison's own table."""
    return [
        {"set": "heldout", "name": line["name"], "repeats": repeats, **line["sampled"]}
        for line in table
        if "sampled" in line
    ]


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and rows in words."""
    lines = [["set", "variant", "sampled", "over seeds", "stderr"]]
    for row in rows:
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.3f}"
        average = f"avg@{row['repeats']} {row['mean']:.3f}"
        lines.append([row["set"], row["name"], average, f"± {row['std_over_seeds']:.3f}", stderr])
    return lines
