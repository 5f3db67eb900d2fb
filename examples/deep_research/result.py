"""What a run of this example did, in figures: python examples/deep_research/result.py RUN

A line for each step, then the evaluations, then how the tools were used. The run page has every rollout in words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = {
    "correct": "main/reward/correct",
    "main format": "main/reward/format",
    "main reward": "main/reward/mean",
    "sub format": "sub/reward/format",
    "sub expert": "sub/reward/expert",
    "sub reward": "sub/reward/mean",
    "sub turns": "sub/task/turns",
}
TOOLS = ("search", "visit")


def steps(run: Path) -> dict[int, dict[str, float]]:
    """step -> metrics of metrics.jsonl, merged over the reports of one step."""
    merged: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        merged.setdefault(int(row["step"]), {}).update(row)
    return merged


def report(run: Path) -> list[str]:
    """The lines to print. Raises OSError or ValueError where the run has no metrics."""
    merged = sorted(steps(run).items())
    lines = ["step  " + "  ".join(f"{name:>11}" for name in COLUMNS)]
    for step, m in merged:
        if "main/reward/mean" in m:
            values = [m.get(name) for name in COLUMNS.values()]
            lines.append(
                f"{step:4}  " + "  ".join(" " * 10 + "-" if v is None else f"{v:11.3f}" for v in values)
            )
    for step, m in merged:
        for split in ("validation", "heldout"):
            if f"eval/{split}/sampled" in m:
                sampled, greedy = m[f"eval/{split}/sampled"], m[f"eval/{split}/greedy"]
                lines.append(
                    f"{split} at step {step}: right answers sampled {sampled:.3f}, greedy {greedy:.3f}"
                )
    for tool in TOOLS:
        calls = [m[f"rollout/tool/{tool}/calls"] for _, m in merged if f"rollout/tool/{tool}/calls" in m]
        if calls:
            lines.append(f"{tool}: {sum(calls) / len(calls):.2f} calls a rollout that called it")
    return lines


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python examples/deep_research/result.py RUN", file=sys.stderr)
        return 2
    try:
        print("\n".join(report(Path(sys.argv[1]))))
    except (OSError, ValueError, KeyError) as error:
        print(f"result: {sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
