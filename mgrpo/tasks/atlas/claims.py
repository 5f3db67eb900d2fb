"""What a comparison on atlas must show: thresholds, each beside what was measured."""

from __future__ import annotations

from mgrpo.environments.comparison import COTRAIN, Claim, Figures
from mgrpo.tasks.words import claims as words

HOPS = {1: 0.25, 2: 0.5, 3: 0.25}
"""Share of the questions with so many relations."""
LOWS = {
    (COTRAIN, "sampled"): 0.85,
    (COTRAIN, "greedy"): 0.90,
    ("frozen sub", "sampled"): 0.45,
    ("frozen sub", "greedy"): 0.45,
    ("frozen main", "sampled"): 0.40,
    ("frozen main", "greedy"): 0.35,
}


def claims(figures: Figures) -> list[Claim]:
    """All of them, whether measured or not."""
    return words.claims(figures, LOWS, pairs=0.40, hops=HOPS, permuted=0.90)
