"""Writes the tables of docs/results.md and the pictures beside it from a finished comparison, or from single runs.

    mgrpo compare examples/atlas/atlas.toml --out runs/compare --seeds 3
    python docs/make_results.py --compare runs/compare       # the comparison, and its co-training runs as the runs

    python docs/make_results.py runs/atlas-1 runs/atlas-2    # the runs only

    python docs/make_results.py --task factbook-small runs/small-1 runs/small-2    # that task's section instead

Every run that is named stands in the table, also one whose start was not valid; so does every run of a comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from mgrpo.metrics import read_metrics
from mgrpo.run.summary import series

DOCS = Path(__file__).parent
MARKS = {"atlas": "", "factbook-small": "small-"}
"""Task -> what the names of its tables and pictures begin with."""
CLOSE = 0.03  # accuracies that differ by less are called as good as each other


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
        before, final = s["heldout"]["start"] or {}, s["heldout"]["final"] or {}
        counts = s["d_k"].get("sub", {})
        total = sum(counts.values()) or 1
        histogram = " / ".join(f"{counts.get(str(d), 0) / total:.2f}" for d in range(5))
        cells = [
            f"{before.get(m, float('nan')):.3f} -> {final.get(m, float('nan')):.3f}"
            for m in ("sampled", "greedy")
        ]
        lines.append(
            f"| {s['seed']} | {'yes' if s['valid'] else 'no'} | {s['steps']} | {cells[0]} | {cells[1]} | {histogram} "
            f"| {s['seconds']:.0f} |"
        )
    lines += ["", "Start validation (value, then the allowed range):", ""]
    lines += [
        f"- seed {s['seed']}: {s['start_validation']['text'] if s['start_validation'] else 'not reached'}"
        for _, s in runs
    ]
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
            ends = [(0, "start"), (summary["steps"], "final")]
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
    titles = ("accuracy on entries never trained on", "mean reward", "sub-agent calls per rollout (d_k)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="RL step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylim(0, 1.02)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)


def comparison(folder: Path, report: Mapping[str, Any], mark: str) -> str:
    """The tables of a comparison, every run in it, and what the numbers allow to be said."""
    parts = [(folder / "compare.md").read_text(encoding="utf-8").strip()]
    parts.append(f"![Held-out accuracy and validation curves of every variant](img/{mark}compare.png)")
    parts += ["Every score, seed by seed (sampled / greedy):", "\n".join(by_seed(report))]
    reasons = [f"- {name}: {reason}" for name, reason in report["failed"].items()]
    parts.append(times(folder, report))
    parts += ["Runs that failed:", "\n".join(reasons)] if reasons else ["No run failed."]
    parts += ["What this says:", "\n".join(f"- {said}" for said in reading(report))]
    return "\n\n".join(parts)


def by_seed(report: Mapping[str, Any]) -> list[str]:
    """A table with a column for each seed."""
    lines = [
        "| variant | " + " | ".join(f"seed {s}" for s in report["seeds"]) + " |",
        "|---" * (1 + len(report["seeds"])) + "|",
    ]
    for row in report["table"]:
        if "sampled" in row and "greedy" in row:
            seeds = report["runs"].get(
                row["name"], dict.fromkeys(map(str, report["seeds"]))
            )  # those that finished
            pairs = zip(row["sampled"]["by_seed"], row["greedy"]["by_seed"], strict=True)
            known = {s: f"{a:.3f} / {b:.3f}" for s, (a, b) in zip(seeds, pairs, strict=True)}
            cells = [known.get(str(s), "-") for s in report["seeds"]]
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def times(folder: Path, report: Mapping[str, Any]) -> str:
    """How long it took."""
    seconds = [
        json.loads((folder / "runs" / f"seed-{s}" / name.replace(" ", "-") / "summary.json").read_text())[
            "seconds"
        ]
        for name, by_seed in report["runs"].items()
        for s in by_seed
    ]
    together, call = sum(seconds) / 60, report["seconds_of_this_call"] / 60
    return f"{len(seconds)} runs of {together:.0f} minutes together; the last call of the command took {call:.0f}."


def reading(report: Mapping[str, Any]) -> list[str]:
    """Sentences that follow from the numbers, the unwelcome ones included."""
    claims = report["claims"]
    broken = [c for c in claims if c["holds"] is False]
    unknown = [c["claim"] for c in claims if c["holds"] is None]
    said = [f"{sum(c['holds'] is True for c in claims)} of {len(claims)} claims hold."]
    for claim in broken:
        bounds = " and ".join(f"{s} {claim[k]:g}" for k, s in (("low", ">="), ("high", "<=")) if k in claim)
        said.append(f"Does not hold: {claim['claim']}, measured {claim['value']:.3f}, wanted {bounds}.")
    if unknown:
        said.append(f"Not measured: {'; '.join(unknown)}.")
    said.append(shared_reading({row["name"]: row for row in report["table"]}))
    return said


def shared_reading(table: Mapping[str, Any]) -> str:
    """Whether separate policies were worth anything over one policy for all roles."""
    row = table.get("shared", {})
    if "sampled" not in row or "greedy" not in row:
        return "One policy shared by all roles was not measured, so nothing here says that separate weights are better."
    modes = [
        (m, row[m]["mean"], row[m]["cotrain_minus"], row[m]["low"], row[m]["high"])
        for m in ("sampled", "greedy")
    ]
    numbers = "; ".join(
        f"{m} {mean:.3f}, co-training minus it {d:+.3f} [{low:+.3f}, {high:+.3f}]"
        for m, mean, d, low, high in modes
    )
    if all(high < 0 for *_, high in modes):
        verdict = "does better, with half the parameters: nothing here says that separate weights help"
    elif max(d for _, _, d, _, _ in modes) < CLOSE:
        verdict = (
            "does as well with half the parameters: the comparison shows that both *roles* must be trained, not that "
            "separate weights win"
        )
    elif all(low > 0 for *_, low, _ in modes):
        verdict = "falls behind here, with half the parameters and the same number of rollouts"
    else:
        verdict = "is not clearly worse: an interval includes 0"
    return f"One policy shared by all roles {verdict} ({numbers})."


def put(page: str, name: str, content: str) -> str:
    """The page with `content` between the markers of `name`. Raises ValueError where they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{DOCS / 'results.md'}: expected {begin} and {end} once each")
    return f"{page.split(begin)[0]}{begin}\n{content}\n{end}{page.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--task", choices=MARKS, default="atlas", help="which section of the page")
    parser.add_argument("--compare", metavar="FOLDER", type=Path, help="the folder of a finished comparison")
    given = parser.parse_args()
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    folders: list[Path] = given.runs
    mark = MARKS[given.task]
    if given.compare is not None:
        report = json.loads((given.compare / "compare.json").read_text(encoding="utf-8"))
        text = put(text, f"{mark}compare", comparison(given.compare, report, mark))
        shutil.copyfile(given.compare / "compare.png", DOCS / "img" / f"{mark}compare.png")
        folders = folders or [given.compare / "runs" / f"seed-{s}" / "co-training" for s in report["seeds"]]
    if not folders:
        parser.error("name runs, or --compare FOLDER")
    runs = [(folder, json.loads((folder / "summary.json").read_text())) for folder in folders]
    page.write_text(put(text, f"{mark}runs", table(runs)), encoding="utf-8")
    picture([r for r in runs if r[1]["outcome"] == "finished"], DOCS / "img" / f"{given.task}.png")


if __name__ == "__main__":
    main()
