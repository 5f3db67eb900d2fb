"""What all benches share: rivals run interleaved, CPU time, medians with their spread, one table, --json.

    times = interleave({"ours": f, "rival": g}, rounds=20)
    report = Report("bench_x")
    report.figure("op at 10k", times["ours"].median, "ms", at_most=1.2)
    report.compare("rivals / ours", Comparison.of(times, "ours", "rival", "other", floor="memcpy"), at_least=6)
    report.compare("memory, ours / rival", Comparison(0.4, {"rival": 9.1}, unit="GB"), value=0.4 / 9.1, at_most=0.6)
    sys.exit(report.finish(args))

`figure` is one number. `compare` is one row of the whole report (bench/report.py): the floor, the best rival, ours and
their ratio, which is the figure's value and what a bound is for. Both end in the same JSON list under their item.

Rivals take turns within a round, so a slow spell of a shared machine hits all of them; a ratio is the median
of the rounds' own ratios. Figures are CPU time, not wall time, unless a bench says otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

BASELINES = Path(__file__).parent / "baselines"
CLOCKS: dict[str, Callable[[], int]] = {
    "thread": time.thread_time_ns,  # this thread only
    "process": time.process_time_ns,  # all threads of this process
    "wall": time.perf_counter_ns,
}


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per call over the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median if self.median else 0.0

    def throughput(self, n_bytes: float) -> float:
        """GB/s at the median."""
        return n_bytes / self.median / 1e6


def interleave(
    providers: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    calls: int | Mapping[str, int] = 1,
    clock: Literal["thread", "process", "wall"] = "thread",
    before: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time every provider once a round, in turn; a sample is the mean over `calls` consecutive calls.

    before() runs untimed ahead of every sample (to flush caches, say). The garbage collector is off while
    timing.
    """
    now = CLOCKS[clock]
    for _ in range(warmup):
        for run in providers.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in providers.items():
                n = calls if isinstance(calls, int) else calls.get(name, 1)
                if before is not None:
                    before()
                start = now()
                for _ in range(n):
                    run()
                samples[name].append((now() - start) / n / 1e6)
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def ratio(times: Mapping[str, Timing], above: str, below: str) -> float:
    """Median over the rounds of time(above) / time(below)."""
    pairs = zip(times[above].samples, times[below].samples, strict=True)
    return statistics.median(a / b for a, b in pairs)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours, rivals of the same run, and a floor: what no implementation can be better than.

    All of them are in `unit`; more_is_better says that they are rates, not times or sizes. A Timing is kept whole, so
    that a ratio is the median of the rounds' own ratios; a plain number is divided as it is.
    """

    ours: Timing | float
    rivals: Mapping[str, Timing | float] = field(default_factory=dict)
    floor: Timing | float | None = None
    floor_name: str = ""
    unit: str = "ms"
    more_is_better: bool = False

    @classmethod
    def of(cls, times: Mapping[str, Timing], ours: str, *rivals: str, floor: str = "") -> Comparison:
        """From the answer of `interleave`, by name. A rival that was not measured is left out."""
        found = {name: times[name] for name in rivals if name in times}
        return cls(times[ours], found, times[floor] if floor else None, floor)

    def advantage(self, rival: str) -> float:
        """How many times better ours is than a rival: above 1 when ours is faster or smaller."""
        return self._better(self.rivals[rival], self.ours)

    @property
    def best_rival(self) -> str:
        """The rival that ours leads by least; "" without rivals."""
        return min(self.rivals, key=self.advantage, default="")

    @property
    def of_floor(self) -> float | None:
        """How many times worse ours is than the floor: 1 is as good as can be."""
        return None if self.floor is None else self._better(self.ours, self.floor)

    @property
    def value(self) -> float:
        """Best rival over ours, or ours over the floor where there is no rival (for rates the other way about)."""
        if self.rivals:
            return self.advantage(self.best_rival)
        if self.of_floor is None:
            raise ValueError("a comparison needs a rival or a floor")
        return self.of_floor

    def as_dict(self) -> dict[str, Any]:
        """Medians alone, with the ratios of the rounds."""
        return {
            "ours": _median(self.ours),
            "rivals": {name: _median(value) for name, value in self.rivals.items()},
            "best_rival": self.best_rival,
            "floor": None if self.floor is None else _median(self.floor),
            "floor_name": self.floor_name,
            "of_floor": self.of_floor,
            "unit": self.unit,
            "more_is_better": self.more_is_better,
        }

    def _better(self, worse: Timing | float, better: Timing | float) -> float:
        return _divided(better, worse) if self.more_is_better else _divided(worse, better)


def _median(value: Timing | float) -> float:
    return value.median if isinstance(value, Timing) else float(value)


def _divided(a: Timing | float, b: Timing | float) -> float:
    """a / b; NaN over 0."""
    if isinstance(a, Timing) and isinstance(b, Timing) and len(a.samples) == len(b.samples):
        return ratio({"a": a, "b": b}, "a", "b")
    below = _median(b)
    return _median(a) / below if below else math.nan


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and what it should be. compared: what it is a ratio of, as Comparison.as_dict gives it."""

    item: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""
    compared: dict[str, Any] | None = None

    @property
    def verdict(self) -> str:
        if self.at_most is None and self.at_least is None:
            return ""
        low = self.at_least is None or self.value >= self.at_least
        high = self.at_most is None or self.value <= self.at_most
        return "pass" if low and high else "miss"

    @property
    def target(self) -> str:
        bounds = (("<=", self.at_most), (">=", self.at_least))
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


class Report:
    """Collects figures, prints them beside their targets and the baseline, and writes JSON."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: list[Figure] = []

    def figure(
        self,
        item: str,
        value: float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
    ) -> None:
        self.figures.append(Figure(item, float(value), unit, at_most, at_least, note))

    def compare(
        self,
        item: str,
        compared: Comparison,
        *,
        value: float | None = None,
        unit: str = "x",
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
    ) -> None:
        """A figure that is a ratio; value: where the item's ratio is another one than Comparison.value."""
        found = compared.value if value is None else float(value)
        self.figures.append(Figure(item, found, unit, at_most, at_least, note, compared.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        figures = [{**asdict(f), "verdict": f.verdict} for f in self.figures]
        return {"bench": self.name, "machine": machine(), "figures": figures}

    def finish(self, args: argparse.Namespace) -> int:
        """Print the table; write --json; 1 when a target is missed and --strict is set, else 0."""
        baseline = _baseline(self.name.removeprefix("bench_"))
        self._print(baseline)
        if args.json:
            Path(args.json).write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        return int(args.strict and any(f.verdict == "miss" for f in self.figures))

    def _print(self, baseline: Mapping[str, float]) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.name} on {machine()['cpu']}")
        for column in ("item", "value", "target", "", "baseline", "note"):
            table.add_column(column, justify="right" if column in ("value", "baseline") else "left")
        for f in self.figures:
            old = f"{baseline[f.item]:.4g}" if f.item in baseline else ""
            mark = {"pass": "[green]pass[/]", "miss": "[red]miss[/]"}.get(f.verdict, "")
            table.add_row(f.item, f"{f.value:.4g} {f.unit}".strip(), f.target, mark, old, f.note)
        Console(width=150).print(table)


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments every bench has."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--json", metavar="PATH", help="write the figures to PATH")
    p.add_argument("--quick", action="store_true", help="fewer rounds and sizes: seconds, not minutes")
    p.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return p


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return {"cpu": cpu, "python": platform.python_version(), "system": platform.platform()}


def _baseline(name: str) -> dict[str, float]:
    path = BASELINES / f"{name}.json"
    if not path.exists():
        return {}
    return {f["item"]: f["value"] for f in json.loads(path.read_text())["figures"]}
