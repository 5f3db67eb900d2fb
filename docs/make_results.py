"""Writes the table of docs/results.md and the picture of the README from finished runs.

    for s in 1 2 3; do mgrpo train examples/atlas/atlas.toml --out runs/atlas-$s --set seed=$s; done
    python docs/make_results.py runs/atlas-1 runs/atlas-2 runs/atlas-3

Every run that is named stands in the table, also one that failed its gate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from mgrpo.cli.summary import series
from mgrpo.metrics import read_metrics

DOCS = Path(__file__).parent
BEGIN, END = "<!-- runs: begin -->", "<!-- runs: end -->"


def machine() -> str:
    cpus = len(os.sched_getaffinity(0))
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{cpus} cores, {model}, no GPU"


def table(runs: list[tuple[Path, dict[str, Any]]]) -> str:
    lines = [
        f"Machine: {machine()}.",
        "",
        "| seed | valid start | steps | sampled: before -> after | greedy: before -> after | d_k 0/1/2/3/4 | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, s in runs:
        warm, final = s["heldout"]["warm"] or {}, s["heldout"]["final"] or {}
        counts = s["d_k"].get("sub", {})
        total = sum(counts.values()) or 1
        histogram = " / ".join(f"{counts.get(str(d), 0) / total:.2f}" for d in range(5))
        cells = [
            f"{warm.get(m, float('nan')):.3f} -> {final.get(m, float('nan')):.3f}"
            for m in ("sampled", "greedy")
        ]
        lines.append(
            f"| {s['seed']} | {'yes' if s['valid'] else 'no'} | {s['steps']} | {cells[0]} | {cells[1]} | {histogram} "
            f"| {s['seconds']:.0f} |"
        )
    lines += ["", "Gate figures (value, then the allowed range):", ""]
    lines += [f"- seed {s['seed']}: {s['gate']['text'] if s['gate'] else 'not reached'}" for _, s in runs]
    return "\n".join(lines)


def picture(runs: list[tuple[Path, dict[str, Any]]], path: Path) -> None:
    """Accuracy, reward and invocations of all runs against the step."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    colours = {"sampled": "tab:blue", "greedy": "tab:orange", "main": "tab:blue", "sub": "tab:orange"}
    for number, (folder, summary) in enumerate(runs):
        records = list(read_metrics(folder))
        for mode in ("sampled", "greedy"):
            points = series(records, f"eval/validation/{mode}")
            label = f"{mode}, validation" if number == 0 else None
            axes[0].plot(*zip(*points, strict=True), color=colours[mode], alpha=0.8, label=label)
            ends = [(0, "warm"), (summary["steps"], "final")]
            dots = [(x, summary["heldout"][when][mode]) for x, when in ends if summary["heldout"][when]]
            label = f"{mode}, held out" if number == 0 else None
            axes[0].plot(*zip(*dots, strict=True), "o", color=colours[mode], label=label)
        for role in ("main", "sub"):
            points = series(records, f"{role}/reward/mean")
            axes[1].plot(
                *zip(*points, strict=True),
                color=colours[role],
                alpha=0.6,
                label=role if number == 0 else None,
            )
        points = series(records, "sub/d_k/mean")
        axes[2].plot(*zip(*points, strict=True), alpha=0.7, label=f"seed {summary['seed']}")
    titles = ("accuracy on countries never trained on", "mean reward", "sub-agent calls per rollout (d_k)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="RL step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylim(0, 1.02)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    folders = parser.parse_args().runs
    runs = [(folder, json.loads((folder / "summary.json").read_text())) for folder in folders]
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(runs)}\n{END}{after}", encoding="utf-8")
    picture([r for r in runs if r[1]["finished"]], DOCS / "img" / "atlas.png")


if __name__ == "__main__":
    main()
