"""The command: runs, scores, verdict, and the files that stay."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mgrpo.cli.comparison import jobs, verdict
from mgrpo.cli.comparison import spent as spending
from mgrpo.cli.comparison.jobs import Basis, final_policies, refused
from mgrpo.cli.comparison.scores import score
from mgrpo.cli.comparison.variants import Variant, chosen, named, scores
from mgrpo.config import load_config
from mgrpo.environments.comparison import COTRAIN, MODES, Figures
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError
from mgrpo.files import remove_partials, write_atomic
from mgrpo.metrics import read_metrics
from mgrpo.run.processes import load_run_task
from mgrpo.run.progress import Display
from mgrpo.run.text import clean


@dataclass(frozen=True)
class Request:
    """What was asked for. names: of variants; none: all that are not on request. origin: the run whose policies after
    RL every variant begins with. repeats: sampled rollouts of each question; None: one of the held-out ones, and of
    the named sets as many as the config says."""

    config: Path
    out: Path
    overrides: Sequence[str]
    seeds: int = 3
    at_once: int = 0
    n: int = 400
    names: Sequence[str] = ()
    origin: Path | None = None
    repeats: int | None = None
    dry_run: bool = False

    def command(self) -> str:
        """As it is typed, without what changes no number."""
        more = [f" --repeats {self.repeats}"] if self.repeats is not None else []
        more += [f" --variants {','.join(self.names)}"] if self.names else []
        more += [f" --from {self.origin}"] if self.origin is not None else []
        return f"mgrpo compare {self.config} --seeds {self.seeds} --n {self.n}{''.join(more)}"


def compare(request: Request) -> None:
    """Run what is missing, score what is new, and write compare.json, compare.md and compare.png. Raises ConfigError
    before anything is started."""
    for option, value in (("--seeds", request.seeds), ("--n", request.n), ("--repeats", request.repeats)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: expected at least 1")
    config = load_config(request.config, request.overrides)
    every = chosen(config, request.names)
    origin = final_policies(request.origin, config) if request.origin is not None else {}
    basis = Basis(request.config, config, request.overrides, request.out, origin, request.repeats)
    task = load_run_task(config)
    left_out = refused(basis, task, every)
    for name in named(config, request.names) | {COTRAIN}:
        if name in left_out:
            raise ConfigError(f"--variant {name!r}: {left_out[name]}")
    every = [v for v in every if v.name not in left_out]
    numbers = list(range(1, request.seeds + 1))
    planned = jobs.plan(basis, numbers, every)
    jobs.check(planned)
    lines = [spending.held_equal(config), *(f"{name} is left out: {why}" for name, why in left_out.items())]
    if request.dry_run:
        print("\n".join([*lines, *map(jobs.described, planned)]))
        return
    # Both end a comparison as Ctrl-C does, also where a shell started it in the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    with Display() as display:
        for line in lines:
            display.line(line)
        failed = jobs.run_all(basis, planned, request.at_once or jobs.side_by_side(), display.line)
        jobs.need(failed)
        results: dict[int, dict[str, Any]] = {seed: {} for seed in numbers}
        for seed in numbers:
            trained = [v for v in every if jobs.is_finished(jobs.run_folder(request.out, seed, v.name))]
            for wanted in scores(config.roles, trained, task.controls):
                found = score(request.out, seed, wanted, request.n, request.repeats or 1, display.line)
                if found is not None:
                    results[seed][wanted.name] = found
    report = _report(task, request, every, results) | {
        "held_equal": spending.held_equal(config), "left_out": left_out, "failed": failed, "machine": _machine(),
        "seconds_of_this_call": round(time.monotonic() - began, 1),
    }  # fmt: skip
    remove_partials(request.out)
    write_atomic(request.out / "compare.json", json.dumps(report, indent=2) + "\n")
    write_atomic(request.out / "compare.md", _markdown(report))
    _show(report, request.out)


def _report(
    task: Task, request: Request, every: Sequence[Variant], results: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    names, out = list(dict.fromkeys(name for r in results.values() for name in r)), request.out
    table = [verdict.row(results, name) for name in names]
    runs = {
        v.name: {s: folder for s in results if jobs.is_finished(folder := jobs.run_folder(out, s, v.name))}
        for v in every
    }
    verdict.draw(out / "compare.png", table, runs)
    figures = Figures({line["name"]: line for line in table}, results, _largest_difference(runs))
    repeated = spending.heldout(table, request.repeats) if request.repeats is not None else []
    return {
        "command": request.command(),
        "overrides": list(request.overrides),
        "n": request.n,
        "repeats": request.repeats or 1,
        "from": None if request.origin is None else str(request.origin),
        "seeds": list(results),
        "table": table,
        "claims": [claim.as_json() for claim in task.claims(figures)],
        "evaluations": [*repeated, *spending.evaluations(runs)],
        "costs": spending.costs(runs),
        "failed_rollouts": {
            name: sum(
                r[name].get(f"failed_{mode}", 0) for r in results.values() if name in r for mode in MODES
            )
            for name in names
        },
        "equal_seconds": {mode: verdict.at_equal_seconds(runs, mode) for mode in MODES},
        "runs": {
            name: {str(s): str(folder) for s, folder in by_seed.items()} for name, by_seed in runs.items()
        },
    }


def _largest_difference(runs: Mapping[str, Mapping[int, Path]]) -> float | None:
    """Of the sampler's and the trainer's log-probs, over all steps of the co-training runs."""
    found = [
        value
        for run in runs.get(COTRAIN, {}).values()
        for record in read_metrics(run)
        for name, value in record.items()
        if name.endswith("policy/logprob_diff_max") and value is not None
    ]
    return max(found, default=None)


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def _cells(line: Mapping[str, Any], mode: str) -> tuple[str, str]:
    known = line.get(mode)
    if known is None:
        return "-", "-"
    mean = f"{known['mean']:.3f} ± {known['std_over_seeds']:.3f}"
    if "cotrain_minus" not in known:
        return mean, ""
    return mean, f"{known['cotrain_minus']:+.3f} [{known['low']:+.3f}, {known['high']:+.3f}]"


def _markdown(report: Mapping[str, Any]) -> str:
    lines = [
        f"`{report['command']}`: {len(report['seeds'])} seeds, {report['n']} held-out questions, "
        f"{report['machine']['cores']} cores ({report['machine']['cpu']}).",
        *(
            ["", "Overrides: " + ", ".join(f"`{o}`" for o in report["overrides"]) + "."]
            if report["overrides"]
            else []
        ),
        "",
        *_lines([_HEAD, *_rows(report)]),
        "",
        "Mean ± standard deviation over seeds; in brackets 95 % of the paired bootstrap.",
    ]
    if lost := {name: count for name, count in report["failed_rollouts"].items() if count}:
        counts = ", ".join(f"{name} {count}" for name, count in lost.items())
        lines += ["", f"Rollouts that failed and are in no mean: {counts}."]
    if report["evaluations"]:
        lines += ["", *_lines(spending.evaluation_table(report["evaluations"]))]
        lines += [
            "",
            "avg@n: mean over questions of the mean of n rollouts; stderr: over the questions of one seed.",
        ]
    lines += ["", report["held_equal"], "", *_lines(spending.cost_table(report["costs"]))]
    if report["claims"]:
        lines += ["", *_lines([["claim", "measured", "bound", "holds"], *map(_claim, report["claims"])])]
    sampled, greedy = (report["equal_seconds"][mode] for mode in MODES)
    equal = [["equal seconds (validation)", "seconds", "sampled", "co-training", "greedy", "co-training"]]
    for name, s in sampled.items():
        g = greedy.get(name, s)
        numbers = (s["accuracy"], s["cotrain"], g["accuracy"], g["cotrain"])
        equal.append([name, f"{s['seconds']:.0f}", *(f"{x:.3f}" for x in numbers)])
    return "\n".join([*lines, "", *_lines(equal)]) + "\n"


_HEAD = ["variant", "sampled", "co-training minus it", "greedy", "co-training minus it"]


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    return [[line["name"], *(c for mode in MODES for c in _cells(line, mode))] for line in report["table"]]


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Of a table in Markdown; the first row is its head."""
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return [head, "|---" * len(table[0]) + "|", *rows]


def _claim(claim: Mapping[str, Any]) -> list[str]:
    bound = " ".join(
        f"{sign} {claim[key]:g}" for key, sign in (("low", ">="), ("high", "<=")) if key in claim
    )
    value = "not measured" if claim["value"] is None else f"{claim['value']:.3g}"
    return [claim["claim"], value, bound, _word(claim["holds"])]


def _word(holds: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[holds]


def _show(report: Mapping[str, Any], out: Path) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 120)  # a table that was piped into a file is not broken at 80
    tables = [[_HEAD, *_rows(report)], spending.evaluation_table(report["evaluations"])]
    for head, *rows in [*tables, spending.cost_table(report["costs"])]:
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)
    console.print(report["held_equal"])
    for claim in report["claims"]:
        if not claim["holds"]:
            state = "not measured" if claim["holds"] is None else f"does not hold: {claim['value']:.3g}"
            console.print(f"{claim['claim']}: {state}")
    for name, reason in report["failed"].items():
        console.print(f"{name}: {clean(reason)}")
    console.print(f"{out / 'compare.md'}, {out / 'compare.json'}, {out / 'compare.png'}")
