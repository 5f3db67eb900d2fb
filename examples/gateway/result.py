"""What a run of this example did: python examples/gateway/result.py RUN

A line for each step, then one rollout as a tree: its reward, d_k (how often main asked the researcher), and each
conversation in words; what was sampled, and is trained, stands behind ">".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mgrpo.metrics import read_metrics
from mgrpo.view.data import RunView

COLUMNS = {
    "correct": "main/reward/correct",
    "main reward": "main/reward/mean",
    "researcher reward": "researcher/reward/mean",
}
SHOWN = 5  # lines of what was given


def steps(run: Path) -> list[str]:
    """A line a step. Raises ValueError where the run has none."""
    merged: dict[int, dict[str, Any]] = {}
    for row in read_metrics(run):
        merged.setdefault(int(row["step"]), {}).update(row)
    lines = ["step  " + "  ".join(f"{name:>17}" for name in COLUMNS)]
    for step, row in sorted(merged.items()):
        if COLUMNS["main reward"] in row:
            values = (row.get(name) for name in COLUMNS.values())
            lines.append(
                f"{step:4}  " + "  ".join(f"{'-' if v is None else format(v, '.3f'):>17}" for v in values)
            )
    if len(lines) == 1:
        raise ValueError("no step was trained")
    return lines


def telling(view: RunView) -> dict[str, Any]:
    """The tree of a rollout of training with a right answer, if there is one, and most invocations."""
    rollouts = [view.rollout(found) for found in view.ids()]
    trained = [tree for tree in rollouts if tree["split"] == "train" and tree["status"] == "ok"]
    if not trained:
        raise ValueError("no rollout of training ended")
    return max(trained, key=lambda tree: (tree["correct"], len(tree["trajectories"])))


def drawn(tree: dict[str, Any]) -> list[str]:
    """A rollout in words."""
    d_k = len(tree["trajectories"]) - 1
    lines = [
        f"rollout {tree['id']}: {tree['question']}",
        f"  answer {tree['answer']!r}, gold {tree['gold']!r}, correct {tree['correct']:.2f}, d_k {d_k}",
    ]
    for trajectory in tree["trajectories"]:
        credit = trajectory["credit"] or {}
        figures = [f"{trajectory['tokens']} tokens"] + [
            f"{name} {credit[name]:.3f}"
            for name in ("reward", "advantage", "weight")
            if credit.get(name) is not None
        ]
        lines.append(f"  {trajectory['role']}/{trajectory['invocation']}: {', '.join(figures)}")
        for turn in trajectory["turns"]:
            mark, said = ">" if turn["sampled"] else " ", [x for x in turn["text"].splitlines() if x.strip()]
            if len(said) > SHOWN and not turn["sampled"]:
                lines.append(f"      [{len(said) - SHOWN} lines of system prompt and examples]")
                said = said[-SHOWN:]
            lines += [f"    {mark} {line}" for line in said]
    return lines


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python examples/gateway/result.py RUN", file=sys.stderr)
        return 2
    run = Path(sys.argv[1])
    try:
        print("\n".join([*steps(run), "", *drawn(telling(RunView(run)))]))
    except (OSError, ValueError) as error:
        print(f"result: {run}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
