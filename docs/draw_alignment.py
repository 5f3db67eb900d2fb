"""Draws docs/img/alignment.png: one group of six rollouts before alignment and in the four modes.

python docs/draw_alignment.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from mgrpo.alignment import Alignment, align

COUNTS, D_MAX, SEED, STEP, QUERY = [1, 4, 2, 0, 6, 3], 4, 1, 0, "12/3"
COLOURS = plt.get_cmap("tab10").colors


def cell(ax: Any, x: int, k: int, i: int, text: str, *, dropped: bool = False, copy: bool = False) -> None:
    """One trajectory: colour = invocation, hatched = a copy, grey = dropped by the draw."""
    face = "white" if dropped else COLOURS[i % 10]
    style = {"hatch": "//", "alpha": 0.45} if copy else {"alpha": 1.0 if dropped else 0.75}
    edge = "lightgrey" if dropped else "black"
    ax.add_patch(Rectangle((x + 0.05, k + 0.1), 0.9, 0.8, facecolor=face, edgecolor=edge, **style))
    ax.text(
        x + 0.5, k + 0.5, text, ha="center", va="center", fontsize=7, color="grey" if dropped else "black"
    )


def before(ax: Any, kept: Alignment) -> None:
    chosen = set(zip(kept.rollout.tolist(), kept.invocation.tolist(), strict=True))
    for k, d in enumerate(COUNTS):
        for i in range(d):
            cell(ax, i, k, i, f"i={i}", dropped=(k, i) not in chosen)


def after(ax: Any, aligned: Alignment, mode: str) -> None:
    for k in range(len(COUNTS)):
        if mode in ("duplicate", "none"):
            seen: set[int] = set()
            for x, row in enumerate(r for r in aligned.slots[k].tolist() if r >= 0):
                copies = aligned.multiplicity[row]
                weight = aligned.weight[row] / copies
                cell(ax, x, k, int(aligned.invocation[row]), f"{weight:.2f}", copy=row in seen)
                seen.add(row)
        else:
            for x, row in enumerate([r for r in range(len(aligned.rollout)) if aligned.rollout[r] == k]):
                cell(ax, x, k, int(aligned.invocation[row]), f"{aligned.weight[row]:.2f}")


def main() -> None:
    modes = ("weights", "duplicate", "expected", "none")
    plans = {m: align(COUNTS, d_max=D_MAX, seed=SEED, step=STEP, query=QUERY, mode=m) for m in modes}
    fig, axes = plt.subplots(1, 5, figsize=(13, 3.6), layout="constrained", sharey=True)
    before(axes[0], plans["weights"])
    axes[0].set_title(f"what arrived (D_max = {D_MAX})\ngrey: dropped by the draw", fontsize=9)
    for ax, mode in zip(axes[1:], modes, strict=True):
        after(ax, plans[mode], mode)
        computed = len(plans[mode].rollout)
        if mode == "duplicate":
            computed = int(plans[mode].multiplicity.sum())
        ax.set_title(f"{mode}\n{computed} trajectories computed", fontsize=9)
    for ax in axes:
        ax.set_xlim(0, max(COUNTS))
        ax.set_ylim(len(COUNTS), 0)
        ax.set_xticks([])
        ax.set_yticks([k + 0.5 for k in range(len(COUNTS))], [f"k={k}, d={d}" for k, d in enumerate(COUNTS)])
        ax.tick_params(length=0, labelsize=8)
        ax.spines[:].set_visible(False)
    path = Path(__file__).parent / "img" / "alignment.png"
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
