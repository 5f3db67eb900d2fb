"""How busy rollout slots are in a run: real store, workers and trainer, tools that wait, policies that cost nothing.

Each rollout waits once, a log-normal time (median 0.5 s); 64 may be under way at once, all workers together. Busy is
the sum of the waits over (wall time x 64), from the first rollout of step 3 to the first of the last step, as the
task's own log tells; whatever the pipeline itself takes counts as idle. Beside every row stand the simulator's share
(bench/simulation.py, same waits, same rules; how long a step takes once its groups are there, and how long after it the
next rollouts start, is measured in the run and is all that it is told) and the least time that any scheduler needs
which trains every group with no token older than max_lag. "late" is how much longer than asked for the waits took: on a
quiet machine nothing, elsewhere the busy shares are too small by as much and more. Rivals in the same command: strict
waves (max_lag 0), batch-synchronous with a quarter more started and the slowest cut (asyncio alone, with neither store
nor trainer), and the ideal: 64 slots always busy.

    python -m bench.bench_rollouts [--quick] [--json PATH] [--sigma 1] [--max-lag 0 1 2 4] [--workers 1 4] [--steps 12]
        [--questions 64]

--quick takes about three minutes on two cores, the full form (sigma 0.5, 1, 1.5) about half an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.common import Comparison, Report, parser
from bench.simulation import Outcome, Setup, Simulation, busy_share, steady_part
from bench.store_rules import RealStore
from bench.waits import least_seconds, one_wait, waits
from mgrpo.metrics import read_metrics
from tests.runs import ROOT, train

CONFIG = ROOT / "bench" / "waiting.toml"
SLOTS, K, MEDIAN = 64, 8, 0.5
SKIP = 3  # steps before the counting begins
AGREE = 0.05  # the simulator's busy share may differ by so much


@dataclass(frozen=True, slots=True)
class Case:
    questions: int
    sigma: float
    max_lag: int
    workers: int
    steps: int

    @property
    def name(self) -> str:
        return (
            f"{self.questions} x {K}, sigma {self.sigma:g}, max_lag {self.max_lag}, {self.workers} worker"
            + "s" * (self.workers > 1)
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """One row. wall: seconds from the first rollout to the end of the last; ideal: the sum of the waits over the slots.
    least: what any scheduler needs. idle: the trainer's share of waiting. late: what the waits took
    too long, over the waits. age_max: steps, of any trained token. step_s, sync_s: as simulate() was told."""

    case: Case
    busy: float
    simulated: float
    wall: float
    ideal: float
    least: float
    idle: float
    late: float
    age_max: float
    step_s: float
    sync_s: float


def run(case: Case, folder: Path) -> Measured:
    """A whole run of the product."""
    out, log = folder / "run", folder / "log"
    options = {"log": str(log), "k": K, "sigma": case.sigma, "median": MEDIAN, "slots": SLOTS // case.workers}
    sets = [f"task.options.{name}={json.dumps(value)}" for name, value in options.items()]
    sets += [
        f"trainer.{name}={value}"
        for name, value in {
            "steps": case.steps, "questions": case.questions, "group_size": K, "max_lag": case.max_lag,
        }.items()
    ]  # fmt: skip
    sets += [f"rollout.workers={case.workers}", f"rollout.slots={SLOTS // case.workers}"]
    train(CONFIG, out, *sets, timeout=1200)
    lines = [line.split() for file in log.glob("*.log") for line in file.read_text().splitlines()]
    rollouts = [(int(index), float(start), float(seconds)) for index, _, start, seconds, _ in lines]
    late = sum(float(line[4]) for line in lines) / sum(float(line[3]) for line in lines) - 1
    planned = case.steps * case.questions * K
    assert len(rollouts) >= planned, f"{len(rollouts)} rollouts in the log, expected {planned}"
    first, last = steady_part(planned_starts(case, ((index, start) for index, start, _ in rollouts)), SKIP)
    spans = [(start, start + seconds) for _, start, seconds in rollouts]
    trained = [m for m in read_metrics(out) if "main/time/step" in m]
    step_s = statistics.median(m["main/time/step"] - m["main/time/wait_batch"] for m in trained)
    sync_s = max(0.0, turnaround(case, rollouts) - step_s)
    outcome = simulate(case, step_s, sync_s)
    steady = steady_part(planned_starts(case, ((f.index, f.start) for f in outcome.flights)), SKIP)
    needed = [seconds for index, _, seconds in rollouts if index < case.steps * case.questions]
    return Measured(
        case, busy_share(spans, SLOTS, first, last), outcome.busy(*steady),
        max(end for _, end in spans) - min(start for start, _ in spans), sum(needed) / SLOTS,
        least_seconds(case.questions, K, SLOTS, case.max_lag, case.steps, case.sigma, MEDIAN),
        sum(m["main/time/wait_batch"] for m in trained) / sum(m["main/time/step"] for m in trained),
        late,
        max(m["main/staleness/max"] for m in trained),
        step_s,
        sync_s,
    )  # fmt: skip


def planned_starts(case: Case, starts: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """(step, start) of the rollouts that the run trains on, of (group, start) of all: the store admits groups beyond
    the last step, which a run that ends has begun or not."""
    return ((i // case.questions, start) for i, start in starts if i < case.steps * case.questions)


def turnaround(case: Case, rollouts: Sequence[tuple[int, float, float]]) -> float:
    """Seconds from the end of a step's last rollout to the first rollout that its version admits: the median over the
    steps in which no other rollout began meanwhile. Where one did, places went to it first, and the simulator has that
    of its own; where this was so in every step, 0."""
    complete = [0.0] * case.steps
    begun = [math.inf] * case.steps
    for index, start, seconds in rollouts:
        if (step := index // case.questions) < case.steps:
            complete[step] = max(complete[step], start + seconds)
            begun[step] = min(begun[step], start)
    ends = list(itertools.accumulate(complete, max))
    found = [
        max(0.0, admitted - end)
        for end, admitted in zip(ends, begun[case.max_lag + 1 :], strict=False)
        if not any(end < start < admitted for _, start, _ in rollouts)
    ]
    return statistics.median(found) if found else 0.0


def simulate(case: Case, step_s: float, sync_s: float) -> Outcome:
    """The same on a virtual clock. step_s: what a step takes once its groups are there; sync_s: from then on to the
    first rollout with the new weights."""
    mode = "stream" if case.max_lag else "waves"
    setup = Setup(case.questions, K, SLOTS, case.workers, mode, step_s=step_s, sync_s=sync_s)  # type: ignore[arg-type]
    rules = RealStore(K, case.questions, case.max_lag)
    return Simulation(setup, one_wait(K, case.sigma, MEDIAN), rules).run(steps=case.steps)


async def cut_slowest(questions: int, sigma: float, steps: int) -> tuple[float, float]:
    """(busy share, seconds a step) of batch-synchronous rollouts: a quarter more groups are started than a step trains
    on; as soon as enough are complete, the rest is cancelled. Its slots are busy also with what is thrown away."""
    places, spans, index = asyncio.Semaphore(SLOTS), [], 0
    began = time.monotonic()

    async def rollout(seconds: float) -> None:
        async with places:
            start = time.monotonic()
            try:
                await asyncio.sleep(seconds)
            finally:
                spans.append((start, time.monotonic()))

    async def group(number: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for seconds in waits(number, K, sigma, MEDIAN):
                tasks.create_task(rollout(seconds))

    for _ in range(steps):
        running = {asyncio.create_task(group(index + i)) for i in range(-(-questions * 5 // 4))}
        index += len(running)
        done: set[asyncio.Task[None]] = set()
        while len(done) < questions:
            more, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    ended = time.monotonic()
    return busy_share(spans, SLOTS, began, ended), (ended - began) / steps


def cases(args: argparse.Namespace) -> list[Case]:
    """Many rollouts a step for every sigma, lag and number of workers; few for sigma 1 and one worker."""
    steps = args.steps
    many = [
        Case(args.questions, s, lag, n, steps)
        for s, n, lag in itertools.product(args.sigma, args.workers, args.max_lag)
    ]
    few = [Case(8, 1.0, lag, 1, 2 * steps) for lag in args.max_lag] if 1.0 in args.sigma else []
    return many + few


def table(rows: list[Measured]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="measured runs")
    for column in (
        "",
        "busy",
        "simulated",
        "wall",
        "of ideal",
        "of the least",
        "trainer idle",
        "late",
        "oldest",
    ):
        shown.add_column(column, justify="left" if not column else "right")
    for r in rows:
        shown.add_row(
            r.case.name, f"{r.busy:.3f}", f"{r.simulated:.3f}", f"{r.wall:.1f} s", f"{r.wall / r.ideal:.2f} x",
            f"{r.wall / r.least:.2f} x", f"{r.idle:.2f}", f"{r.late:.1%}", f"{r.age_max:.0f}",
        )  # fmt: skip
    Console(width=130).print(shown)


def judge(report: Report, rows: list[Measured]) -> None:
    """Targets: sigma 1 and many rollouts a step."""
    least_busy = {1: 0.8, 2: 0.9}
    for r in rows:
        judged = r.case.sigma == 1 and r.case.questions > 8
        report.figure(
            f"{r.case.name}: busy", r.busy, at_least=least_busy.get(r.case.max_lag) if judged else None,
            note=f"takes {r.wall / r.least:.2f} x the least of any scheduler",
        )  # fmt: skip
        if judged and r.case.max_lag == 2:
            compared = Comparison(r.wall, floor=r.ideal, floor_name="ideal", unit="s")
            report.compare(f"{r.case.name}: wall of ideal", compared, at_most=1.15)
        if r.age_max > r.case.max_lag:
            raise SystemExit(f"{r.case.name}: a token {r.age_max:g} steps old was trained")
    apart = max(abs(r.busy - r.simulated) for r in rows)
    report.figure("largest difference between simulated and measured busy share", apart, at_most=AGREE)


def main() -> int:
    p = parser(__doc__ or "")
    p.add_argument("--sigma", type=float, nargs="+")
    p.add_argument("--max-lag", type=int, nargs="+")
    p.add_argument("--workers", type=int, nargs="+")
    p.add_argument("--questions", type=int, default=64, help="of a step with many rollouts, times 8 of them")
    p.add_argument("--steps", type=int, help="of a run with many rollouts a step; with few, twice as many")
    args = p.parse_args()
    args.steps = args.steps or (6 if args.quick else 12)
    args.sigma = args.sigma or ([1.0] if args.quick else [0.5, 1.0, 1.5])
    args.max_lag = args.max_lag or ([0, 1, 2] if args.quick else [0, 1, 2, 4])
    args.workers = args.workers or ([1] if args.quick else [1, 4])
    report = Report("bench_rollouts")
    rows = []
    for case in cases(args):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(case, Path(folder)))
        r = rows[-1]
        print(
            f"{r.case.name}: busy {r.busy:.3f}, simulated {r.simulated:.3f} (a step {r.step_s:.2f} s, then "
            f"{r.sync_s:.2f} s), wall {r.wall / r.ideal:.2f} of the ideal, late {r.late:.1%}", flush=True,
        )  # fmt: skip
    for sigma, questions in itertools.product(args.sigma, sorted({r.case.questions for r in rows})):
        busy, seconds = asyncio.run(cut_slowest(questions, sigma, 3))
        ideal = questions * K * MEDIAN * 2.718281828 ** (sigma**2 / 2) / SLOTS
        report.figure(
            f"{questions} x {K}, sigma {sigma:g}, batch-synchronous, slowest fifth cut: of ideal", seconds / ideal, "x",
            note=f"slots in use {busy:.2f}, a fifth of it for nothing",
        )  # fmt: skip
    table(rows)
    judge(report, rows)
    status = report.finish(args)
    if args.json:
        data = json.loads(Path(args.json).read_text()) | {"rows": [asdict(r) for r in rows]}
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
