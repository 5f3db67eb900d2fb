"""What `mgrpo compare` gives a task to judge: held-out scores of every variant, and the claims it makes about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

COTRAIN = "co-training"
BEFORE_RL = "before RL"
MODES = ("sampled", "greedy")
Outcomes = npt.NDArray[np.float64]  # (seeds, questions); NaN where a question was not scored


def mean_of(outcomes: Outcomes) -> float:
    """Over everything that was scored; NaN where nothing was."""
    scored = outcomes[~np.isnan(outcomes)]
    return float(scored.mean()) if scored.size else float("nan")


@dataclass(frozen=True)
class Claim:
    """Something the comparison must show: value compared with a bound."""

    text: str
    value: float | None
    low: float = -np.inf
    high: float = np.inf

    @property
    def holds(self) -> bool | None:
        """None: not measured."""
        return None if self.value is None else bool(self.low <= self.value <= self.high)

    def as_json(self) -> dict[str, Any]:
        bounds = {"low": self.low, "high": self.high}
        finite = {name: float(b) for name, b in bounds.items() if np.isfinite(b)}
        return {"claim": self.text, "value": self.value, "holds": self.holds, **finite}


def outcomes(results: Mapping[int, Mapping[str, Any]], name: str, mode: str) -> Outcomes | None:
    """(seeds, questions) of one score, seeds that have it only; results[seed][name] is a score file's content."""
    rows = [r[name][mode] for r in results.values() if name in r and mode in r[name]]
    return np.array(rows, np.float64) if rows else None


@dataclass(frozen=True)
class Figures:
    """The scores of a comparison. table: name of a score -> its row (means, spreads, differences, by mode).
    results[seed][name]: the content of its file. logprob_difference: the largest of sampler and trainer in the
    co-training runs. A figure that was not measured is None."""

    table: Mapping[str, Mapping[str, Any]]
    results: Mapping[int, Mapping[str, Any]]
    logprob_difference: float | None

    def mean(self, name: str, mode: str, key: str = "mean") -> float | None:
        """Mean outcome of a score; or another entry of its row."""
        value = self.table.get(name, {}).get(mode, {}).get(key)
        return None if value is None else float(value)

    def behind(self, name: str, mode: str) -> float | None:
        """Co-training minus this score."""
        return self.mean(name, mode, "cotrain_minus")

    def gain(self, name: str, mode: str) -> float | None:
        """This score minus that before RL."""
        after, before = self.mean(name, mode), self.mean(BEFORE_RL, mode)
        return None if after is None or before is None else after - before

    def real(self, name: str, mode: str) -> float | None:
        """How often a score's answers are the questions' `real_answer`."""
        found = outcomes(self.results, name, f"real_{mode}")
        return None if found is None else mean_of(found)

    def calls(self, name: str) -> dict[int, int]:
        """d_k -> number of rollouts of a score with so many invocations, over all sub-agent roles and seeds."""
        counts: dict[int, int] = {}
        for result in self.results.values():
            for histogram in result.get(name, {}).get("d_k", {}).values():
                for d, count in histogram.items():
                    counts[int(d)] = counts.get(int(d), 0) + count
        return counts
