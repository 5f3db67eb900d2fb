"""What a run leaves for people: summary.json and curves.png, both made from metrics.jsonl and the run's reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgrpo.metrics import read_metrics


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, replaced as a whole."""
    partial = folder / ".summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    partial.rename(folder / "summary.json")


def draw_curves(folder: Path, title: str) -> Path | None:
    """curves.png: accuracy, reward, invocations and entropy against the step. None without matplotlib or data."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = list(read_metrics(folder))
    if not records:
        return None
    subs = sorted({k.split("/")[0] for r in records for k in r if k.endswith("/d_k/mean")})
    roles = ["main", *subs]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    figure.suptitle(title)
    accuracy, reward, calls, entropy = axes.flat
    for split, style in (("validation", "-"), ("heldout", "o")):
        for mode, colour in (("sampled", "tab:blue"), ("greedy", "tab:orange")):
            points = series(records, f"eval/{split}/{mode}")
            if points:
                accuracy.plot(*zip(*points, strict=True), style, color=colour, label=f"{split}, {mode}")
    accuracy.set(title="accuracy on questions never trained on", ylim=(0, 1.02))
    for axis, name, label in (
        (reward, "reward/mean", "mean reward"),
        (entropy, "policy/entropy", "entropy (nats)"),
    ):
        for role in roles:
            points = series(records, f"{role}/{name}")
            if points:
                axis.plot(*zip(*points, strict=True), label=role)
        axis.set(title=label)
    for role in subs:
        for name in ("mean", "max"):
            points = series(records, f"{role}/d_k/{name}")
            if points:
                calls.plot(*zip(*points, strict=True), label=f"{role}, {name}")
    calls.set(title="invocations per rollout (d_k)")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric; a step that was trained again after a restart counts once, the last time."""
    points = {int(r["step"]): float(r[name]) for r in records if r.get(name) is not None}
    return sorted(points.items())
