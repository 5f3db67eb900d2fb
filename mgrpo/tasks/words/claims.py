"""What a comparison must show of a team in a closed vocabulary: thresholds, each beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from mgrpo.environments.comparison import COTRAIN, MODES, Claim, Figures

RANDOM_SEARCH, PERMUTED = "random search results", "permuted facts"
CONTROLS = {RANDOM_SEARCH: {"search": "random"}, PERMUTED: {"facts": "permuted"}}
"""Held-out scores of co-training's policies under other task options."""
Lows = Mapping[tuple[str, str], float]
"""(variant, mode) -> least of co-training's score, or of co-training minus a rival's."""


def claims(
    figures: Figures, lows: Lows, pairs: float, hops: Mapping[int, float], permuted: float
) -> list[Claim]:
    """All of them, whether measured or not. pairs: least that a cross pair is behind; hops: share of the questions with
    so many relations; permuted: least score on permuted facts."""
    mean, behind, gain = figures.mean, figures.behind, figures.gain
    out = []
    for (name, mode), low in lows.items():
        if name == COTRAIN:
            out.append(Claim(f"{name}, {mode}", mean(name, mode), low=low))
        else:
            out.append(Claim(f"co-training minus {name}, {mode}", behind(name, mode), low=low))
    out.append(
        Claim(
            "d_k against the hop mix, total variation", hop_distance(figures.calls(COTRAIN), hops), high=0.1
        )
    )
    for mode in MODES:
        real = figures.real(PERMUTED, mode)
        out += [
            Claim(f"random search results, {mode}", mean(RANDOM_SEARCH, mode), high=0.05),
            Claim(f"permuted facts, {mode}: follows the documents", mean(PERMUTED, mode), low=permuted),
            Claim(f"permuted facts, {mode}: says the real world's", real, high=0.05),
            Claim(f"gain with shuffled rewards, {mode}", gain("shuffled rewards", mode), high=0.05),
            Claim(f"gain with lr 0, {mode}", gain("lr 0", mode), low=0.0, high=0.0),
            Claim(f"expert off behind co-training, {mode}", behind("expert off", mode), low=0.0),
        ]
        for name in figures.table:
            if name.endswith("(cross pair)"):
                out.append(Claim(f"co-training minus {name}, {mode}", behind(name, mode), low=pairs))
    difference = figures.logprob_difference
    out.append(Claim("log-probs of sampler and trainer, largest difference", difference, high=1e-4))
    return out


def hop_distance(calls: Mapping[int, int], hops: Mapping[int, float]) -> float | None:
    """Total variation between invocations per rollout and the questions' hops."""
    total = sum(calls.values())
    if not total:
        return None
    return 0.5 * sum(abs(calls.get(d, 0) / total - hops.get(d, 0.0)) for d in {*calls, *hops})
