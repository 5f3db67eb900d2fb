"""What a run of this example did, in figures: python examples/smollm2/result.py RUN

A line for each step (reward, its parts, share of trajectories that had an advantage), the evaluations, and how far the
two policies have moved: from the model they started as, and from each other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROLES = ("main", "sub")


def steps(run: Path) -> dict[int, dict[str, float]]:
    """step -> metrics of metrics.jsonl, merged over the reports of one step."""
    merged: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        report: dict[str, Any] = json.loads(line)
        merged.setdefault(int(report["step"]), {}).update(report)
    return merged


def distance(a: Path, b: Path) -> tuple[int, int, float]:
    """(tensors that differ, all tensors, root mean square difference of those) of two model folders."""
    changed, count, total, squares = 0, 0, 0, 0.0
    with (
        safe_open(a / "model.safetensors", "pt") as x,
        safe_open(b / "model.safetensors", "pt") as y,
    ):
        names = sorted(set(x.keys()) & set(y.keys()))
        for name in names:
            gap = x.get_tensor(name).float() - y.get_tensor(name).float()
            if bool(torch.any(gap != 0)):
                changed += 1
                count += gap.numel()
                squares += float(gap.double().square().sum())
        total = len(names)
    return changed, total, (squares / count) ** 0.5 if count else 0.0


def report(run: Path) -> list[str]:
    """The lines to print. Raises OSError or ValueError where the run has no metrics or no final policies."""
    merged = steps(run)
    columns = [(r, n) for r in ROLES for n in ("reward/mean", "reward/format", "advantage/frac_zero")]
    head = f"{'step':>4}  {'correct':>7}  {'expert':>7}  " + "  ".join(
        f"{r} {n.split('/')[1 if n != 'reward/mean' else 0]:>9}" for r, n in columns
    )
    lines = [head]
    for step, m in sorted(merged.items()):
        if "main/reward/mean" in m:
            figures = [
                m.get("main/reward/correct"),
                m.get("sub/reward/expert"),
                *(m.get(f"{r}/{n}") for r, n in columns),
            ]
            lines.append(f"{step:4}  " + "  ".join("      -" if v is None else f"{v:7.3f}" for v in figures))
    for step, m in sorted(merged.items()):
        for split in ("validation", "heldout"):
            if f"eval/{split}/sampled" in m:
                lines.append(
                    f"{split} at step {step}: sampled {m[f'eval/{split}/sampled']:.3f}, "
                    f"greedy {m[f'eval/{split}/greedy']:.3f}"
                )
    start = json.loads((run / "config.json").read_text())["agents"]
    final = {role: run / "agents" / role / "final" for role in ROLES}
    pairs = [(f"{r}, start to end", Path(start[r]["model"]), final[r]) for r in ROLES]
    for what, a, b in [*pairs, ("main to sub, at the end", final["main"], final["sub"])]:
        changed, total, rms = distance(a, b)
        lines.append(f"{what}: {changed} of {total} tensors differ, by {rms:.2e} (root mean square)")
    return lines


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python examples/smollm2/result.py RUN", file=sys.stderr)
        return 2
    try:
        print("\n".join(report(Path(sys.argv[1]))))
    except (OSError, ValueError, KeyError) as error:
        print(f"result: {sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
