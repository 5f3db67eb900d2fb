"""Every bench, one after the other, and one page of what they found: floor, best rival, ours, ratio, bound, machine.

    make bench                                       # python -m bench.report
    python -m bench.report --quick --only bench_store bench_batcher --out store.html
    python -m bench.report --render                  # the page again, from the figures of the last runs

Each bench is a process with a deadline. One that fails, hangs or finds no rival is a row of the page, not its end.
Figures and logs stay in --folder as NAME.json and NAME.log; the page is one file that needs no network.
"""

from __future__ import annotations

import argparse
import datetime
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.common import machine
from bench.report_page import Heading, page
from bench.running import ROOT, Outcome, job_of, outcome_of, run, stop_on_sigterm

BENCHES = Path(__file__).parent
DEADLINE_S, QUICK_DEADLINE_S = 1200.0, 300.0
STEP = "bench_train_step"
STEP_BYTES = 14e9
"""Of free memory; with less the step bench has a model of 4 layers, with more the micro-batches of its baseline."""


def names() -> list[str]:
    """Of all benches. The whole step comes first on the page, then the others by name."""
    found = sorted(p.stem for p in BENCHES.glob("bench_*.py"))
    return sorted(found, key=lambda name: (name != STEP, name))


def commit() -> str:
    """Of the sources, with a mark when they were changed since; "unknown" outside of a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=, changed since", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def measured(chosen: Sequence[str], quick: bool, deadline_s: float, folder: Path) -> list[Outcome]:
    """Run the benches, with a line before and after each."""
    began, outcomes = time.monotonic(), []
    for number, name in enumerate(chosen, 1):
        elapsed = time.monotonic() - began
        print(f"== {number} of {len(chosen)}: {name} ({elapsed:.0f} s so far)", flush=True)
        outcome = run(job_of(name, arguments_of(name, quick, deadline_s), deadline_s), folder)
        missed = sum(f.get("verdict") == "miss" for f in outcome.figures)
        found = (
            f"{len(outcome.figures)} figures, {missed} missed" if outcome.status == "ok" else outcome.reason
        )
        print(f"   {name}: {outcome.status} after {outcome.seconds:.0f} s, {found}", flush=True)
        outcomes.append(outcome)
    return outcomes


def rendered(chosen: Sequence[str], folder: Path) -> list[Outcome]:
    """What lies in the folder from earlier runs."""
    paths = {name: folder / f"{name}.json" for name in chosen}
    return [
        outcome_of(name, path) if path.exists() else Outcome(name, "not run", reason=f"no {path.name}")
        for name, path in paths.items()
    ]


def arguments_of(name: str, quick: bool, deadline_s: float) -> list[str]:
    """What a bench is given. The whole step begins nothing in the second half of its time: one of a rival's may take
    minutes."""
    if quick:
        return ["--quick"] if name != "bench_compile" else []  # which measures nothing and has no such flag
    if name != STEP:
        return []
    small = psutil.virtual_memory().available < STEP_BYTES
    size = ["--model", "quick"] if small else ["--micro-batch", "2572"]
    return [*size, "--limit", f"{deadline_s / 2:.0f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 whenever the page is written: a missed bound is a row of it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer rounds and sizes: minutes")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these benches alone")
    p.add_argument("--out", type=Path, default=BENCHES / "report.html", help="the page")
    p.add_argument("--folder", type=Path, default=ROOT / "build" / "bench", help="figures and logs")
    p.add_argument("--deadline", type=float, metavar="S", help="seconds of a bench (1200; 300 with --quick)")
    p.add_argument("--render", action="store_true", help="run nothing: the page of the figures in --folder")
    args = p.parse_args(arguments)
    every = names()
    chosen = [name if name.startswith("bench_") else f"bench_{name}" for name in args.only] or every
    if unknown := sorted(set(chosen) - set(every)):
        p.error(f"no bench {', '.join(unknown)}; there are {', '.join(every)}")
    deadline = QUICK_DEADLINE_S if args.quick else DEADLINE_S
    deadline = deadline if args.deadline is None else args.deadline
    if not 0 < deadline < math.inf:
        p.error(f"--deadline is {deadline:g} s: it must be above 0 and finite")
    began = time.monotonic()
    if args.render:
        outcomes, what = rendered(chosen, args.folder), "figures of earlier runs"
    else:
        outcomes = measured(chosen, args.quick, deadline, args.folder)
        what = (
            "quick: fewer rounds and sizes than the bounds are for" if args.quick else "all rounds and sizes"
        )
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    heading = Heading(now, commit(), machine(), what, time.monotonic() - began)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(heading, outcomes))
    print(f"wrote {args.out} ({heading.seconds:.0f} s in all)", flush=True)
    return 0


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
