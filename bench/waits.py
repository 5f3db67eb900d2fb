"""Seconds that tools take, drawn for each rollout: the same in a real run and in the simulator."""

from __future__ import annotations

import numpy as np

from bench.simulation import Work


def waits(index: int, k: int, sigma: float, median: float = 0.5, seed: int = 0) -> list[float]:
    """Seconds that the tool of each rollout of group `index` takes: log-normal."""
    r = np.random.default_rng([seed, index])
    return [float(s) for s in r.lognormal(np.log(median), sigma, k)]


def one_wait(k: int, sigma: float, median: float = 0.5, seed: int = 0) -> Work:
    """Rollouts that are one wait."""
    return lambda index: [[(0.0, seconds)] for seconds in waits(index, k, sigma, median, seed)]


def least_seconds(
    questions: int, k: int, slots: int, max_lag: int, steps: int, sigma: float, median: float = 0.5
) -> float:
    """No scheduler needs less for `steps` steps where every group is trained, none with a token older than max_lag
    steps: step s ends after step s - 1, after its longest rollout, which began when step s - max_lag - 1 had ended, and
    with `slots` places for the work."""
    ends: list[float] = []
    work = 0.0
    for step in range(steps):
        seconds = [s for i in range(questions) for s in waits(step * questions + i, k, sigma, median)]
        work += sum(seconds)
        opened = ends[step - max_lag - 1] if step > max_lag else 0.0
        ends.append(max(ends[-1] if ends else 0.0, opened + max(seconds), work / slots))
    return ends[-1]
