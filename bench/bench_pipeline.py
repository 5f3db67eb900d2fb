"""A cluster's pipeline on a virtual clock: how many GPUs for rollouts, how many for training, which max_lag?

The simulator (bench/simulation.py) drives the run's own store rules, worker scheduler and batcher; engines, tools and
the trainer are made up, as the options say. Default: a 32B policy; an engine of 4 GPUs decodes n sequences at 15 ms +
0.1 ms x n a token; a rollout has some 7 turns of some 540 sampled tokens, with tools of log-normal time (median 15 s,
sigma 1) between them, and 3.5 tokens of context for each sampled one; the trainer takes 2,000 tokens a second and GPU.
A step trains GPUs / 2 questions x 16 rollouts; 20 rollouts are in flight for each rollout GPU.

    python -m bench.bench_pipeline [--quick] [--json PATH] [--picture docs/img/pipeline.png]
    python -m bench.bench_pipeline --sizes 16 128 1024 4096

The full form takes about four minutes, --quick less than one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import Comparison, Report, parser
from bench.simulation import Mode, Outcome, Setup, Simulation, Turns, Work
from bench.store_rules import AnyOrder, RealStore, StoreRules
from bench.waits import least_seconds, one_wait

GPUS_AN_ENGINE, GPUS_A_RANK, IN_FLIGHT, K = 4, 8, 20, 16
TRAIN_RATE = 2000.0  # tokens a second and GPU
DECODE = (0.015, 1e-4)
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to run the pipeline. max_lag: of AnyOrder, math.inf is the ideal that trains whatever there is."""

    name: str
    max_lag: float = 0
    mode: Mode = "stream"
    any_order: bool = False
    drop_late: bool = False
    deadline: float = math.inf
    window: bool = False  # a trainer may claim one step's groups past an older one

    def rules(self, questions: int) -> StoreRules:
        if self.any_order or self.mode == "cut":
            return AnyOrder(K, questions, self.max_lag, self.drop_late)
        return RealStore(K, questions, int(self.max_lag), claim_window=1 + questions * self.window)


@dataclass(frozen=True, slots=True)
class Row:
    """What a simulated hour came to, after one that is not counted. steps: an hour. age: steps between sampling and
    training, over tokens. failed: share of rollouts that were cut or over their deadline; lost: of groups."""

    rule: str
    gpus: int
    rollout_gpus: int
    in_flight: int
    max_lag: float
    busy: float
    idle: float
    steps: float
    age_mean: float
    age_max: int
    ages: dict[int, float]
    failed: float
    lost: float
    cpu: float


def research(seed: int, k: int = K) -> Work:
    """Rollouts of a research agent: hard questions take more turns; turns and tools are log-normal."""

    def rollouts(index: int) -> list[Turns]:
        r = np.random.default_rng([seed, index])
        hard = r.lognormal(0, 0.4)
        out: list[Turns] = []
        for _ in range(k):
            n = int(np.clip(r.lognormal(np.log(6 * hard), 0.5), 1, 40))
            tokens, seconds = r.lognormal(np.log(450), 0.6, n), r.lognormal(np.log(15), 1.0, n)
            out.append(list(zip(tokens.tolist(), seconds.tolist(), strict=True)))
        return out

    return rollouts


def simulate(rule: Rule, gpus: int, train_share: float, seed: int = 0) -> Row:
    """Two virtual hours; the second counts."""
    engines = max(1, round(gpus * (1 - train_share) / GPUS_AN_ENGINE))
    train = gpus - engines * GPUS_AN_ENGINE
    questions, slots = max(8, gpus // 2), engines * GPUS_AN_ENGINE * IN_FLIGHT
    workers = max(1, slots // 80)
    if rule.mode != "stream":
        workers = math.gcd(workers, questions)  # each plays the same number of a step's groups
    setup = Setup(
        questions, K, slots, workers, rule.mode, engines=engines, decode=DECODE, train_rate=train * TRAIN_RATE,
        context=3.5, step_s=5.0, deadline_s=rule.deadline, sync_s=10.0, ranks=max(1, train // GPUS_A_RANK), poll_s=1.0,
    )  # fmt: skip
    began = time.process_time()
    outcome = Simulation(setup, research(seed), rule.rules(questions)).run(2 * HOUR)
    return _row(rule, outcome, gpus, engines * GPUS_AN_ENGINE, time.process_time() - began)


def _row(rule: Rule, outcome: Outcome, gpus: int, rollout_gpus: int, cpu: float) -> Row:
    tokens = outcome.staleness.total() or 1
    ages = {age: n / tokens for age, n in sorted(outcome.staleness.items())}
    late = [at for _, at, _ in outcome.steps if at > HOUR]
    before = max((at for _, at, _ in outcome.steps if at <= HOUR), default=HOUR)
    steps = len(late) / (late[-1] - before) * HOUR if late else 0.0
    ended = sum(f.end >= 0 for f in outcome.flights)
    return Row(
        rule.name, gpus, rollout_gpus, outcome.setup.slots, rule.max_lag, outcome.busy(HOUR, 2 * HOUR),
        outcome.idle(HOUR, 2 * HOUR), steps, sum(age * share for age, share in ages.items()), max(ages, default=0),
        ages, outcome.failed / max(1, ended), outcome.lost * K / max(1, ended), cpu,
    )  # fmt: skip


def ways(lags: Sequence[int]) -> list[Rule]:
    """What is compared at one size."""
    middle = lags[len(lags) // 2]
    return [
        Rule("strict waves (max_lag 0)", 0, "waves"),
        Rule(f"waves, max_lag {middle}", middle, "waves"),
        Rule("batch-synchronous, 1.25 x started, slowest cut", math.inf, "cut"),
        *[Rule(f"streaming, max_lag {lag}", lag) for lag in lags],
        Rule(f"streaming, max_lag {middle}, claim window of a step", middle, window=True),
        *[Rule(f"streaming, max_lag {lag}, deadline 900 s", lag, deadline=900) for lag in lags],
        Rule(f"any order, {middle} steps ahead, late ones trained", middle, any_order=True),
        Rule(f"any order, {middle} steps ahead, late ones dropped", middle, any_order=True, drop_late=True),
        Rule("ideal: slots always full, any age", math.inf, any_order=True),
    ]


def table(title: str, rows: Sequence[Row], best: float) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for column in ("", "GPUs", "for rollouts", "in flight", "slots busy", "trainer idle", "steps/h", "of ideal",
                   "age mean / max", "cut or failed", "lost", "CPU"):  # fmt: skip
        shown.add_column(column, justify="left" if not column else "right")
    for r in rows:
        shown.add_row(
            r.rule, str(r.gpus), str(r.rollout_gpus), f"{r.in_flight:,}", f"{r.busy:.2f}", f"{r.idle:.2f}",
            f"{r.steps:.1f}", f"{r.steps / best:.2f}" if best else "-", f"{r.age_mean:.1f} / {r.age_max}",
            f"{r.failed:.1%}", f"{r.lost:.1%}", f"{r.cpu:.0f} s",
        )  # fmt: skip
    Console(width=165).print(shown)


# -- the bound ------------------------------------------------------------------------------------------------


def bound_rows(report: Report, steps: int) -> None:
    """64 slots, sigma 1: few rollouts a step against many."""
    targets = {(64, 1): 0.8, (64, 2): 0.9, (128, 1): 0.8, (128, 2): 0.9}
    for questions, lag in (*itertools.product((8, 64), (1, 2, 4)), (128, 1), (128, 2)):
        setup = Setup(questions, 8, 64)
        enough = steps if questions < 128 else steps // 2
        outcome = Simulation(setup, one_wait(8, 1.0), RealStore(8, questions, lag)).run(steps=enough)
        least = least_seconds(questions, 8, 64, lag, enough, sigma=1.0)
        report.figure(
            f"{questions} x 8 rollouts a step, 64 slots, max_lag {lag}: busy",
            outcome.busy(*outcome.steady(3)), at_least=targets.get((questions, lag)),
            note=f"takes {outcome.seconds / least:.2f} x the least that any scheduler needs",
        )  # fmt: skip


# -- the picture ----------------------------------------------------------------------------------------------


def picture(path: Path, rows: Sequence[Row], shares: Sequence[Row]) -> None:
    """Left: what each rule makes of a cluster. Middle: how to divide it. Right: how old trained tokens are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best = rows[-1].steps
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 5), layout="constrained", width_ratios=(1.5, 1, 1)
    )
    order = list(reversed(rows))
    colours = ["tab:blue" if r.rule.startswith("streaming") else "tab:grey" for r in order]
    left.barh([r.rule for r in order], [r.steps / best for r in order], color=colours)
    for y, r in enumerate(order):
        left.text(
            r.steps / best + 0.01, y, f"{r.steps / best:.2f}  (busy {r.busy:.2f})", va="center", fontsize=8
        )
    left.set(xlim=(0, 1.35), xlabel="steps an hour, of the ideal's")
    left.set_title(f"{rows[0].gpus} GPUs, {rows[0].rollout_gpus} of them for rollouts, {rows[0].in_flight:,} in flight",
                   fontsize=10)  # fmt: skip
    left.tick_params(axis="y", labelsize=8)
    for name in dict.fromkeys(r.rule for r in shares):
        found = [r for r in shares if r.rule == name]
        middle.plot(
            [r.rollout_gpus / r.gpus for r in found], [r.steps for r in found], marker="o", label=name
        )
    middle.set(xlabel="share of the GPUs that sample", ylabel="steps an hour", ylim=(0, None))
    middle.set_title(f"how to divide {shares[0].gpus} GPUs", fontsize=10)
    middle.legend(fontsize=8)
    for r in [r for r in rows if r.ages and ("deadline" in r.rule or "trained" in r.rule)]:
        grid = range(max(r.ages) + 1)
        right.plot(list(grid), np.cumsum([r.ages.get(age, 0.0) for age in grid]), marker=".", label=r.rule)
    right.set(
        xlabel="age when trained, steps", ylabel="share of tokens not older", ylim=(0, 1.02), xlim=(0, 20)
    )
    right.set_title("how old trained tokens are", fontsize=10)
    right.legend(fontsize=7, loc="lower right")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def run(args: argparse.Namespace, report: Report) -> dict[str, list[Row]]:
    lags = (1, 2, 4) if args.quick else (1, 2, 4, 8)
    compared = 64 if args.quick else args.gpus
    bound_rows(report, 40 if args.quick else 100)
    rows = [simulate(rule, compared, args.train_share) for rule in ways(lags)]
    best = rows[-1].steps
    table("ways to run it (simulated, an hour after an hour)", rows, best)
    divide = [Rule("ideal", math.inf, any_order=True), *[Rule(f"max_lag {lag}, deadline 900 s", lag, deadline=900)
              for lag in lags]]  # fmt: skip
    size = min(compared, 64)
    shares = [
        simulate(rule, size, share)
        for rule in divide for share in ((0.2, 0.4) if args.quick else (0.1, 0.2, 0.3, 0.4, 0.5))
    ]  # fmt: skip
    table("how to divide them (simulated)", shares, max(r.steps for r in shares))
    middle = replace(divide[-1], name=f"streaming, max_lag {lags[-1]}, deadline 900 s")
    sizes = [
        simulate(middle, n, args.train_share)
        for n in args.sizes or ((16, 256) if args.quick else (16, 128, 1024))
    ]
    table("sizes (simulated)", sizes, 0.0)
    for large in [r for r in sizes if r.gpus == 1024]:
        report.figure("1,024 GPUs: rollouts in flight", large.in_flight, at_least=10_000)
        report.figure("1,024 GPUs, two virtual hours: CPU time", large.cpu, "s", at_most=180)
    streaming = [r for r in rows if r.rule.startswith("streaming")]
    beyond = max(r.age_max - r.max_lag for r in streaming)
    report.figure("streaming: oldest trained token, steps beyond max_lag", beyond, at_most=0)
    others = {r.rule: r.steps for r in rows if not r.rule.startswith(("streaming", "any", "ideal"))}
    for r in rows:
        item, note = f"{r.rule}: steps/h of ideal", f"busy {r.busy:.2f}, trainer idle {r.idle:.2f}"
        if r in streaming:
            steps = Comparison(r.steps, others, best, "ideal", "steps/h", more_is_better=True)
            report.compare(item, steps, value=r.steps / best, unit="", note=note)
        else:
            report.figure(item, r.steps / best, note=note)
    return {"ways": rows, "shares": shares, "sizes": sizes}


def main() -> int:
    p = parser(__doc__ or "")
    p.add_argument("--gpus", type=int, default=128, help="of the comparison of rules")
    p.add_argument("--sizes", type=int, nargs="+", help="numbers of GPUs, e.g. 16 128 1024 4096")
    p.add_argument("--train-share", type=float, default=0.3, help="share of the GPUs that train")
    p.add_argument("--picture", type=Path, metavar="PATH")
    args = p.parse_args()
    report = Report("bench_pipeline")
    found = run(args, report)
    if args.picture:
        picture(args.picture, found["ways"], found["shares"])
    status = report.finish(args)
    if args.json:
        data: dict[str, Any] = json.loads(Path(args.json).read_text())
        data |= {name: [asdict(r) for r in rows] for name, rows in found.items()}
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
