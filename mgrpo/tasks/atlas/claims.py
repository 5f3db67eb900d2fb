"""What a comparison on atlas must show: thresholds, each beside what was measured."""

from __future__ import annotations

from mgrpo.environments.comparison import COTRAIN, MODES, Claim, Figures

RANDOM_SEARCH, PERMUTED = "random search results", "permuted facts"
CONTROLS = {RANDOM_SEARCH: {"search": "random"}, PERMUTED: {"facts": "permuted"}}
"""Held-out scores of co-training's policies under other task options."""
HOPS = {1: 0.25, 2: 0.5, 3: 0.25}
"""Share of the questions with so many relations."""


def claims(figures: Figures) -> list[Claim]:
    """All of them, whether measured or not."""
    mean, behind, gain = figures.mean, figures.behind, figures.gain
    out = [
        Claim("co-training, sampled", mean(COTRAIN, "sampled"), low=0.85),
        Claim("co-training, greedy", mean(COTRAIN, "greedy"), low=0.90),
    ]
    for name, mode, low in (("frozen sub", "sampled", 0.45), ("frozen sub", "greedy", 0.45),
                            ("frozen main", "sampled", 0.40), ("frozen main", "greedy", 0.35)):  # fmt: skip
        out.append(Claim(f"co-training minus {name}, {mode}", behind(name, mode), low=low))
    out.append(
        Claim("d_k against the hop mix, total variation", hop_distance(figures.calls(COTRAIN)), high=0.1)
    )
    for mode in MODES:
        real = figures.real(PERMUTED, mode)
        out += [
            Claim(f"random search results, {mode}", mean(RANDOM_SEARCH, mode), high=0.05),
            Claim(f"permuted facts, {mode}: follows the documents", mean(PERMUTED, mode), low=0.90),
            Claim(f"permuted facts, {mode}: says the real world's", real, high=0.05),
            Claim(f"gain with shuffled rewards, {mode}", gain("shuffled rewards", mode), high=0.05),
            Claim(f"gain with lr 0, {mode}", gain("lr 0", mode), low=0.0, high=0.0),
            Claim(f"expert off behind co-training, {mode}", behind("expert off", mode), low=0.0),
        ]
        for name in figures.table:
            if name.endswith("(cross pair)"):
                out.append(Claim(f"co-training minus {name}, {mode}", behind(name, mode), low=0.40))
    difference = figures.logprob_difference
    out.append(Claim("log-probs of sampler and trainer, largest difference", difference, high=1e-4))
    return out


def hop_distance(calls: dict[int, int]) -> float | None:
    """Total variation between invocations per rollout and the questions' hops, 1 : 2 : 1."""
    total = sum(calls.values())
    if not total:
        return None
    return 0.5 * sum(abs(calls.get(d, 0) / total - HOPS.get(d, 0.0)) for d in {*calls, *HOPS})
