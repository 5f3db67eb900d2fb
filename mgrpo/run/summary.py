"""What a run leaves for people: summary.json and curves.png, both made from metrics.jsonl and the run's reports."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgrpo.files import write_atomic
from mgrpo.metrics import read_metrics

SUMMARY = "summary.json"


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, replaced as a whole. Raises OSError."""
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a run; {} where there is none yet, or none that can be read."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def draw_curves(folder: Path, title: str) -> Path | None:
    """curves.png: accuracy, reward, invocations and entropy against the step. None without matplotlib or data. Raises
    OSError."""
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
    for name in sorted({k for r in records for k in r if k.startswith("eval/") and k.count("/") == 2}):
        if name.endswith("/avg"):
            accuracy.plot(*zip(*series(records, name), strict=True), "s--", label=name.split("/")[1])
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
    save_figure(figure, path)
    plt.close(figure)
    return path


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure as a file, whole or not at all. Raises OSError."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png")
    write_atomic(path, data.getvalue())


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric; a step that was trained again after a restart counts once, the last time."""
    points = {int(r["step"]): float(r[name]) for r in records if r.get(name) is not None}
    return sorted(points.items())
