"""The command: runs, scores, verdict, and the files that stay."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mgrpo.cli.comparison import jobs, verdict
from mgrpo.cli.comparison.scores import score
from mgrpo.cli.comparison.variants import Variant, chosen, scores
from mgrpo.config import load_config
from mgrpo.environments.comparison import COTRAIN, MODES, Figures
from mgrpo.environments.task import Task
from mgrpo.errors import ConfigError
from mgrpo.files import remove_partials, write_atomic
from mgrpo.metrics import read_metrics
from mgrpo.run.processes import load_run_task
from mgrpo.run.progress import Display
from mgrpo.run.text import clean


def compare(
    config_path: Path, out: Path, overrides: Sequence[str], *, seeds: int, at_once: int, n: int,
    names: Sequence[str],
) -> None:  # fmt: skip
    """Run what is missing, score what is new, and write compare.json, compare.md and compare.png."""
    for option, value in (("--seeds", seeds), ("--n", n)):
        if value < 1:
            raise ConfigError(f"{option} {value}: expected at least 1")
    # Both end a comparison as Ctrl-C does, also where a shell started it in the background with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    config = load_config(config_path, overrides)
    every = chosen(config, list(names))
    task = load_run_task(config)
    numbers = list(range(1, seeds + 1))
    began = time.monotonic()
    with Display() as display:
        planned = jobs.plan(out, numbers, every)
        jobs.check(config_path, config.policy_roles, planned, overrides)
        failed = jobs.run_all(
            config_path, config, planned, overrides, at_once or jobs.side_by_side(), display.line
        )
        jobs.need(failed)
        results: dict[int, dict[str, Any]] = {seed: {} for seed in numbers}
        for seed in numbers:
            trained = [v for v in every if jobs.is_finished(jobs.run_folder(out, seed, v.name))]
            for wanted in scores(config.roles, trained, task.controls):
                found = score(out, seed, wanted, n, display.line)
                if found is not None:
                    results[seed][wanted.name] = found
    seconds = time.monotonic() - began
    report = _report(task, out, every, results) | {
        "command": f"mgrpo compare {config_path} --seeds {seeds} --n {n}",
        "overrides": list(overrides),
        "n": n, "seconds_of_this_call": round(seconds, 1), "machine": _machine(), "failed": failed,
    }  # fmt: skip
    remove_partials(out)
    write_atomic(out / "compare.json", json.dumps(report, indent=2) + "\n")
    write_atomic(out / "compare.md", _markdown(report))
    _show(report, out)


def _report(
    task: Task, out: Path, every: Sequence[Variant], results: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    names = list(dict.fromkeys(name for r in results.values() for name in r))
    table = [verdict.row(results, name) for name in names]
    runs = {
        v.name: {s: folder for s in results if jobs.is_finished(folder := jobs.run_folder(out, s, v.name))}
        for v in every
    }
    verdict.draw(out / "compare.png", table, runs)
    figures = Figures({line["name"]: line for line in table}, results, _largest_difference(runs))
    return {
        "seeds": list(results),
        "table": table,
        "claims": [claim.as_json() for claim in task.claims(figures)],
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
        "",
        "| variant | sampled | co-training minus it | greedy | co-training minus it |",
        "|---|---|---|---|---|",
    ]
    for line in report["table"]:
        cells = [c for mode in MODES for c in _cells(line, mode)]
        lines.append(f"| {line['name']} | {' | '.join(cells)} |")
    lines += ["", "Mean ± standard deviation over seeds; in brackets 95 % of the paired bootstrap."]
    if report["claims"]:
        lines += ["", "| claim | measured | bound | holds |", "|---|---|---|---|"]
        for claim in report["claims"]:
            bound = " ".join(
                f"{sign} {claim[key]:g}" for key, sign in (("low", ">="), ("high", "<=")) if key in claim
            )
            value = "not measured" if claim["value"] is None else f"{claim['value']:.3g}"
            lines.append(f"| {claim['claim']} | {value} | {bound} | {_word(claim['holds'])} |")
    lines += ["", "| equal seconds (validation) | seconds | sampled | co-training | greedy | co-training |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    sampled, greedy = (report["equal_seconds"][mode] for mode in MODES)
    for name, s in sampled.items():
        g = greedy.get(name, s)
        lines.append(
            f"| {name} | {s['seconds']:.0f} | {s['accuracy']:.3f} | {s['cotrain']:.3f} | {g['accuracy']:.3f} | "
            f"{g['cotrain']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _word(holds: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "-"}[holds]


def _show(report: Mapping[str, Any], out: Path) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 120)  # a table that was piped into a file is not broken at 80
    table = Table("variant", "sampled", "co-training minus it", "greedy", "co-training minus it")
    for line in report["table"]:
        table.add_row(line["name"], *(c for mode in MODES for c in _cells(line, mode)))
    console.print(table)
    for claim in report["claims"]:
        if not claim["holds"]:
            state = "not measured" if claim["holds"] is None else f"does not hold: {claim['value']:.3g}"
            console.print(f"{claim['claim']}: {state}")
    for name, reason in report["failed"].items():
        console.print(f"{name}: {clean(reason)}")
    console.print(f"{out / 'compare.md'}, {out / 'compare.json'}, {out / 'compare.png'}")
