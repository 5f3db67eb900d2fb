"""From scores to a table: means, spreads, paired bootstrap intervals; the task judges it (Task.claims).

The bootstrap draws seeds and, within them, questions; the same draw serves both sides of a difference, so what the
sides share (an easy question, a lucky start) cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.benchmarks.statistics import standard_error
from mgrpo.environments.comparison import COTRAIN, MODES, Outcomes, mean_of, outcomes
from mgrpo.metrics import read_metrics
from mgrpo.run.summary import save_figure

RESAMPLES = 5000


def interval(difference: Outcomes, seed: int = 0) -> tuple[float, float]:
    """95 % of the bootstrap means of paired differences (seeds, questions)."""
    rng = np.random.default_rng(seed)
    seeds, n = difference.shape
    means = np.empty(RESAMPLES)
    mean = mean_of if np.isnan(difference).any() else np.mean  # the plain one takes half the time
    for i in range(RESAMPLES):
        rows = difference[rng.integers(seeds, size=seeds)]
        means[i] = mean(rows[:, rng.integers(n, size=n)])
    means = means[~np.isnan(means)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def row(results: Mapping[int, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """One line of the table: of each mode mean, spread over seeds, standard error over a seed's questions, and
    co-training minus this one with its interval. Questions that one of the two was not scored on are in no
    difference."""
    line: dict[str, Any] = {"name": name}
    for mode in MODES:
        mine = outcomes(results, name, mode)
        if mine is None:
            continue
        by_seed = np.array([mean_of(questions) for questions in mine])
        spread = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else 0.0
        line[mode] = {
            "mean": mean_of(mine), "std_over_seeds": spread, "by_seed": by_seed.tolist(),
            "stderr": root_mean_square([standard_error(q[~np.isnan(q)].tolist()) for q in mine]),
        }  # fmt: skip
        both = {s: r for s, r in results.items() if name in r and COTRAIN in r}
        if name != COTRAIN and both:
            ours, theirs = outcomes(both, COTRAIN, mode), outcomes(both, name, mode)
            assert ours is not None and theirs is not None
            difference = ours - theirs
            if np.isnan(difference).all():
                continue
            low, high = interval(difference)
            line[mode] |= {"cotrain_minus": mean_of(difference), "low": low, "high": high}
    return line


def root_mean_square(errors: Sequence[float | None]) -> float | None:
    """Of standard errors, one a seed: that of a typical seed. None where there is none, e.g. of a single question."""
    known = [error for error in errors if error is not None and not math.isnan(error)]
    return math.sqrt(math.fsum(e * e for e in known) / len(known)) if known else None


def curve(run: Path, mode: str) -> list[tuple[int, float, float]]:
    """(step, seconds of RL, validation accuracy) of a run, in order of steps."""
    points: dict[int, tuple[int, float, float]] = {}
    began: float | None = None
    for record in read_metrics(run):
        value = record.get(f"eval/validation/{mode}")
        if value is not None:
            if began is None:
                began = record["time"]
            points[int(record["step"])] = (int(record["step"]), record["time"] - began, value)
    return [points[step] for step in sorted(points)]


def at_equal_seconds(runs: Mapping[str, Mapping[int, Path]], mode: str) -> dict[str, dict[str, float]]:
    """Variant -> its validation accuracy and co-training's, each at the last evaluation within the same seconds of RL:
    those of the shorter of the two runs. Means over seeds."""
    out: dict[str, dict[str, float]] = {}
    for name, by_seed in runs.items():
        rows = []
        for seed, run in by_seed.items():
            other = runs.get(COTRAIN, {}).get(seed)
            mine, theirs = curve(run, mode), curve(other, mode) if other else []
            if not mine or not theirs:
                continue
            seconds = min(mine[-1][1], theirs[-1][1])
            rows.append((seconds, *(_last_within(points, seconds) for points in (mine, theirs))))
        if rows:
            seconds, own, cotrain = np.mean(rows, axis=0)
            out[name] = {"seconds": float(seconds), "accuracy": float(own), "cotrain": float(cotrain)}
    return out


def _last_within(points: Sequence[tuple[int, float, float]], seconds: float) -> float:
    return [value for _, at, value in points if at <= seconds][-1]


def draw(path: Path, table: Sequence[Mapping[str, Any]], runs: Mapping[str, Mapping[int, Path]]) -> bool:
    """compare.png: held-out bars with the spread over seeds, and the validation curves. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (bars, steps, clock) = plt.subplots(
        1, 3, figsize=(15, 5.4), width_ratios=(1.2, 1, 1), constrained_layout=True
    )
    shown = [line for line in table if "sampled" in line]
    at = np.arange(len(shown))
    for offset, mode in ((-0.2, "sampled"), (0.2, "greedy")):
        means = [line[mode]["mean"] for line in shown]
        spread = [line[mode]["std_over_seeds"] for line in shown]
        bars.barh(at + offset, means, 0.38, xerr=spread, label=mode)
    bars.set(title="held-out accuracy (bars: standard deviation over seeds)", xlim=(0, 1.05))
    bars.set_yticks(at, [line["name"] for line in shown])
    bars.invert_yaxis()
    bars.legend()
    for number, (name, by_seed) in enumerate(runs.items()):
        for axis, place in ((steps, 0), (clock, 1)):
            for first, run in enumerate(by_seed.values()):
                points = curve(run, "sampled")
                if points:
                    axis.plot([p[place] for p in points], [p[2] for p in points], color=f"C{number}",
                              alpha=0.75, label=name if first == 0 else None)  # fmt: skip
    steps.set(title="validation, sampled, equal rollouts", xlabel="step", ylim=(0, 1.02))
    clock.set(title="validation, sampled, equal seconds", xlabel="seconds of RL", ylim=(0, 1.02))
    for axis in (steps, clock):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)
    return True
