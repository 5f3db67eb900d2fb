"""What a run of this example learned, in one line, and where its curves are: python examples/embed_trl/result.py RUN"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mgrpo.run.summary import draw_curves

COUNTED = 5  # steps at either end whose mean is reported


def report(run: Path) -> str:
    """The line. Raises OSError, ValueError where the run has no metrics."""
    steps: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps.setdefault(int(row["step"]), {}).update(row)
    ends = []
    for role, trainer in (("main", "mgrpo's trainer"), ("sub", "TRL's trainer")):
        rewards = [m[f"{role}/reward/mean"] for _, m in sorted(steps.items()) if f"{role}/reward/mean" in m]
        if not rewards:
            raise ValueError(f"{run}: no steps of {role}")
        n = min(COUNTED, len(rewards))
        first, last = sum(rewards[:n]) / n, sum(rewards[-n:]) / n
        ends.append(f"{role} ({trainer}) {first:.2f} -> {last:.2f}")
    evals = [m["eval/validation/sampled"] for _, m in sorted(steps.items()) if "eval/validation/sampled" in m]
    ends.append(f"right answers to questions never trained on {evals[0]:.2f} -> {evals[-1]:.2f}")
    return f"reward over {len(rewards)} steps: {', '.join(ends)}"


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
    print(f"curves: {draw_curves(Path(sys.argv[1]), 'one agent by TRL, one by mgrpo')}")
