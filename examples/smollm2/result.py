"""What a run of this example did, in figures: python examples/smollm2/result.py RUN

A line for each step (reward, its parts, share of trajectories that had an advantage), the evaluations, and how far the
two policies have moved: from the model they started as, and from each other.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROLES = ("main", "sub")
SHORT = {"reward/mean": "reward", "reward/format": "format", "advantage/frac_zero": "zero-adv"}


def steps(run: Path) -> dict[int, dict[str, float]]:
    """step -> metrics of metrics.jsonl, merged over the reports of one step."""
    merged: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        report: dict[str, Any] = json.loads(line)
        merged.setdefault(int(report["step"]), {}).update(report)
    return merged


@dataclass(slots=True)
class Distance:
    """Of two model folders. A tensor that is the other one in bfloat16 is counted apart: a policy that computes in
    bfloat16 keeps its frozen matrices so, and no training moved them."""

    tensors: int = 0
    rounded: int = 0
    moved: int = 0
    squares: float = 0.0
    values: int = 0

    def __str__(self) -> str:
        rms = (self.squares / self.values) ** 0.5 if self.values else 0.0
        rounded = f"; {self.rounded} more are rounded to bfloat16" if self.rounded else ""
        return f"{self.moved} of {self.tensors} tensors differ, by {rms:.2e} (root mean square){rounded}"


def distance(a: Path, b: Path) -> Distance:
    """How far the model in folder b is from the one in a. Raises OSError, ValueError where they are not comparable."""
    found = Distance()
    with safe_open(a / "model.safetensors", "pt") as x, safe_open(b / "model.safetensors", "pt") as y:
        if set(x.keys()) != set(y.keys()):
            raise ValueError(f"{a} and {b} have other tensors: {sorted(set(x.keys()) ^ set(y.keys()))[:3]}")
        for name in x.keys():  # noqa: SIM118 - no mapping
            one, other = x.get_tensor(name).float(), y.get_tensor(name).float()
            found.tensors += 1
            if torch.equal(one, other):
                continue
            if torch.equal(one.bfloat16().float(), other):
                found.rounded += 1
                continue
            found.moved += 1
            found.values += one.numel()
            found.squares += float((one - other).double().square().sum())
    return found


def report(run: Path) -> list[str]:
    """The lines to print. Raises OSError or ValueError where the run has no metrics or no final policies."""
    merged = steps(run)
    columns = [(r, n) for r in ROLES for n in SHORT]
    head = ["correct", "expert", *(f"{r} {SHORT[n]}" for r, n in columns)]
    lines = ["step  " + "  ".join(f"{name:>13}" for name in head)]
    for step, m in sorted(merged.items()):
        if "main/reward/mean" in m:
            figures = [
                m.get("main/reward/correct"),
                m.get("sub/reward/expert"),
                *(m.get(f"{r}/{n}") for r, n in columns),
            ]
            lines.append(
                f"{step:4}  " + "  ".join(" " * 12 + "-" if v is None else f"{v:13.3f}" for v in figures)
            )
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
        lines.append(f"{what}: {distance(a, b)}")
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
