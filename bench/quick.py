"""The regression guard: ratios of the benches that carry the project's claims, each against a bound.

    make bench-quick                                  # python -m bench.quick [--table TOML] [--folder DIR]

Ratios alone, against floors and rivals of the same process, so that another machine or a busy one has the same bounds;
they have room for noise and are no claims (bench/quick.toml says how they were found). A bench whose ratio is past its
bound, or that crashes, runs again by itself. The command fails (exit 1) only when the same ratio is past its bound, or
the bench crashes, twice in a row. Everything else is a line of its report: a ratio that was missed once, a rival that
is not installed, a bench that its deadline or the command's own has stopped, or that the machine has no room for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.running import ROOT, Job, Outcome, job_of, run, stop_on_sigterm

TABLE = Path(__file__).parent / "quick.toml"
Verdict = Literal["pass", "missed once", "MISSED TWICE", "not run", "CRASHED TWICE"]
FAILURES: tuple[Verdict, ...] = ("MISSED TWICE", "CRASHED TWICE")


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure must be, inclusively."""

    item: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def holds(self, value: float) -> bool:
        """False for NaN, too."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        sides = ((">=", self.at_least), ("<=", self.at_most))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in sides if math.isfinite(bound))


@dataclass(frozen=True, slots=True)
class Check:
    """A bench and the bounds of its figures."""

    job: Job
    bounds: tuple[Bound, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report. values: first and second measurement, as far as there are."""

    bench: str
    item: str
    bound: str
    values: tuple[float, ...]
    verdict: Verdict
    why: str = ""

    def __str__(self) -> str:
        values = " and ".join(f"{v:.4g}" for v in self.values) or "-"
        why = f"  ({self.why})" if self.why else ""
        return f"{self.verdict:13} {self.bench}: {self.item}: {values}, bound {self.bound or '-'}{why}"


def read_table(path: Path) -> tuple[float, list[Check]]:
    """(seconds that the whole may take, checks). Raises ValueError for a bench without bounds or an unknown key."""
    table = tomllib.loads(path.read_text())
    limit, checks = float(table.pop("limit_s")), []
    for name, entry in table.items():
        unknown = sorted(entry.keys() - {"arguments", "deadline_s", "at_least", "at_most"})
        if unknown:
            raise ValueError(f"{path}: {name} has unknown keys {unknown}")
        low, high = entry.get("at_least", {}), entry.get("at_most", {})
        items = list(dict.fromkeys([*low, *high]))
        if not items:
            raise ValueError(f"{path}: {name} has no bound")
        bounds = tuple(Bound(item, low.get(item, -math.inf), high.get(item, math.inf)) for item in items)
        job = job_of(name, entry.get("arguments", ["--quick"]), float(entry["deadline_s"]))
        checks.append(Check(job, bounds))
    return limit, checks


def guard(checks: Sequence[Check], limit_s: float, measure: Callable[[Job], Outcome]) -> list[Row]:
    """Every check's rows; a bench runs a second time where a bound was missed or where it crashed."""
    began, rows = time.monotonic(), []
    for check in checks:
        left = limit_s - (time.monotonic() - began)
        if left <= 0:
            rows += _not_run(check, f"the command's {limit_s:g} s are over")
            continue
        first = _measured(check, measure, left)
        second = None
        left = limit_s - (time.monotonic() - began)
        if left > 0 and (first.status == "crashed" or _missed(check, first)):
            print(
                f"== {check.job.name} again: {first.reason or ', '.join(_missed(check, first))}", flush=True
            )
            second = _measured(check, measure, left)
        found = rows_of(check, first, second)
        for row in found:
            print(row, flush=True)
        rows += found
    return rows


def rows_of(check: Check, first: Outcome, second: Outcome | None) -> list[Row]:
    """A row for each bound; one alone where the bench gave no figures at all."""
    if first.status == "crashed":
        if second is not None and second.status == "crashed":
            why = f"{first.reason}, then {second.reason}"
            return [Row(check.job.name, "the bench itself", "", (), "CRASHED TWICE", why)]
        if second is None:
            return _not_run(check, f"{first.reason}; no time for a second try")
        # What a crash hides counts as the second measurement: one miss of it fails nothing.
        return [_row(check.job.name, b, second, None, "crashed at first") for b in check.bounds]
    if first.status != "ok":
        return _not_run(check, first.reason)
    return [_row(check.job.name, b, first, second) for b in check.bounds]


def _row(bench: str, bound: Bound, first: Outcome, second: Outcome | None, why: str = "") -> Row:
    value = first.value(bound.item)
    if value is None:
        reasons = [r for r in first.remarks if r] or [first.reason or "the bench did not measure it here"]
        return Row(bench, bound.item, str(bound), (), "not run", "; ".join(reasons))
    if bound.holds(value):
        return Row(bench, bound.item, str(bound), (value,), "pass", why)
    again = None if second is None else second.value(bound.item)
    if again is None:
        why = why or "not measured again" + (f": {second.reason}" if second and second.reason else "")
        return Row(bench, bound.item, str(bound), (value,), "missed once", why)
    verdict: Verdict = "missed once" if bound.holds(again) else "MISSED TWICE"
    return Row(bench, bound.item, str(bound), (value, again), verdict, why)


def _missed(check: Check, outcome: Outcome) -> list[str]:
    values = ((b, outcome.value(b.item)) for b in check.bounds)
    return [b.item for b, value in values if value is not None and not b.holds(value)]


def _not_run(check: Check, why: str) -> list[Row]:
    return [Row(check.job.name, b.item, str(b), (), "not run", why) for b in check.bounds]


def _measured(check: Check, measure: Callable[[Job], Outcome], left: float) -> Outcome:
    job = check.job
    print(f"== {job.name}", flush=True)
    outcome = measure(Job(job.name, job.command, min(job.deadline_s, left)))
    print(f"   {job.name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
    if outcome.status in ("crashed", "hung"):
        print(outcome.tail, flush=True)
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when something failed twice in a row, else 0."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", type=Path, default=TABLE, help="benches and bounds")
    p.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-quick", help="logs and figures")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these benches alone")
    args = p.parse_args(arguments)
    limit, checks = read_table(args.table)
    unknown = sorted(set(args.only) - {c.job.name for c in checks})
    if unknown:
        p.error(f"{args.table} has no {', '.join(unknown)}")
    checks = [c for c in checks if not args.only or c.job.name in args.only]
    began = time.monotonic()
    rows = guard(checks, limit, lambda job: run(job, args.folder))
    return summary(rows, time.monotonic() - began, args.folder)


def summary(rows: Sequence[Row], seconds: float, folder: Path) -> int:
    """Print what is not a pass, write rows.json, and give the exit status."""
    count = {v: sum(r.verdict == v for r in rows) for v in ("pass", "missed once", "not run", *FAILURES)}
    print(
        f"== {seconds:.0f} s: " + ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n), flush=True
    )
    for row in rows:
        if row.verdict != "pass":
            print(row, flush=True)
    data: list[dict[str, Any]] = [asdict(row) for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.json").write_text(json.dumps(data, indent=1) + "\n")
    except OSError as error:
        print(f"rows.json is not written: {error}", flush=True)
    failed = [row for row in rows if row.verdict in FAILURES]
    if failed:
        print(f"bench-quick failed, first of {len(failed)}: {failed[0]}", file=sys.stderr, flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    stop_on_sigterm()
    sys.exit(main())
