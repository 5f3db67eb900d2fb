"""`mgrpo top`: how all agents of a run stand, live in the terminal.

Asks the run's store where it answers (on this machine or on another address) and reads metrics.jsonl where it does not:
a run that has ended, or one that has not begun.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mgrpo.config import RunConfig, config_digest, load_config
from mgrpo.environments.failure import KINDS
from mgrpo.errors import ConfigError, DeadlineError, PeerError
from mgrpo.metrics import read_metrics
from mgrpo.run.external import external_roles
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.run.progress import clock
from mgrpo.run.reports import every_report, values_of
from mgrpo.run.text import clean
from mgrpo.store.client import StoreClient
from mgrpo.transport.keys import client_keys
from mgrpo.view.timeline import STEPS, as_text, timeline

RECENT = 20  # steps that the time left is estimated from
ASK_SECONDS = 2.0
SPEEDS = (
    ("mfu", "perf/mfu", ".1%"), ("tok/s", "perf/tok_per_s", ",.0f"), ("shared", "perf/shared", ".0%"),
    ("GB", "perf/peak_mem_gb", ".1f"),
)  # fmt: skip
"""Columns that are there only where a trainer has reported more than 0: title, metric, form."""


class RunStatus:
    """The last known value of every metric of a run, and what its store says."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.values: dict[str, tuple[int, float]] = {}  # name -> (step, value)
        self.steps: dict[str, int] = dict.fromkeys(config.roles, 0)
        self.stats: dict[str, Any] | None = None  # None: the store does not answer
        self.state = ""
        self.missing: list[str] = []  # roles whose external trainer is not there
        self.paused: list[str] = []  # workers that wait for a service that is down
        self.services: dict[str, dict[str, float]] = {}  # name -> counter -> sum over all reports
        self.recent: list[Mapping[str, Any]] = []  # lines of metrics.jsonl, for the timeline
        self._counted: set[int] = set()  # numbers of the reports whose counters are in the sums
        self._durations: dict[str, list[float]] = {role: [] for role in config.roles}

    def take(self, step: int, values: Mapping[str, Any], seq: int | None = None) -> None:
        """One report or one line of metrics.jsonl. seq: number of the report, which may come in both ways."""
        counts = seq is None or seq not in self._counted
        if seq is not None:
            self._counted.add(seq)
        for name, value in values.items():
            if value is None:
                continue
            if name.startswith("service/") and name.count("/") == 2:
                _, service, counter = name.split("/")
                known = self.services.setdefault(service, {})
                known[counter] = known.get(counter, 0.0) + (float(value) if counts else 0.0)
            self.values[name] = (step, float(value))
            role, _, rest = name.partition("/")
            if rest == "reward/mean" and role in self.steps:
                self.steps[role] = step
            if rest == "time/step" and role in self._durations:
                self._durations[role] = [*self._durations[role], float(value)][-RECENT:]

    def note(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, which says when it was."""
        if any(name.endswith(("/time/step", "/perf/busy")) for name in record):
            keep = STEPS * (len(self.config.roles) + self.config.rollout.workers)
            self.recent = [*self.recent, dict(record)][-keep:]

    def value(self, name: str) -> float:
        """NaN while unknown."""
        return self.values.get(name, (0, math.nan))[1]

    def left(self) -> float:
        """Seconds to the end of the slowest role; NaN while unknown."""
        longest = math.nan
        for role in self.config.training_roles:
            known = self._durations[role]
            if known:
                rest = (self.config.trainer.steps - self.steps[role]) * sum(known) / len(known)
                longest = rest if math.isnan(longest) else max(longest, rest)
        return longest


class Watcher:
    """Brings a RunStatus up to date. Use as a context manager."""

    def __init__(self, run: Path) -> None:
        """run: a run's folder, or the TOML file of a run on several addresses."""
        config = load_config(run) if run.is_file() else recorded_run(run)
        if run.is_file() and config.store.url is None:
            raise ConfigError(f"{run}: store.url is not set, so the run is known by its folder only")
        self.status = RunStatus(config)
        self._folder = None if run.is_file() else run
        addresses = RunFolder(run).addresses(config)
        self._client = StoreClient(
            addresses.store, "observer", timeout=ASK_SECONDS, run=config_digest(config),
            key=client_keys(addresses, "observer"),
        )  # fmt: skip
        self._seen = -1
        self._lines = 0

    def refresh(self) -> None:
        status = self.status
        try:
            status.stats = self._client.stats()
            status.state = str(status.stats["control"])
            world = self._client.world()
            status.missing = [role for role in external_roles(status.config) if role not in world.trainers]
            status.paused = list(world.paused)
            for report in every_report(self._client, self._seen):
                self._seen = report.seq
                status.take(*values_of(report.kind, report.payload), report.seq)
        except (DeadlineError, PeerError):
            status.stats, status.state, status.paused = None, "no answer from the store", []
        if self._folder is not None:
            # A resumed run's store keeps its latest reports only; the file has all of them.
            for number, record in enumerate(read_metrics(self._folder)):
                if number >= self._lines:
                    self._lines = number + 1
                    status.note(record)
                    seq = record.pop("seq", None)
                    status.take(int(record.pop("step")), record, None if seq is None else int(seq))

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def render(status: RunStatus) -> Group:
    """The whole screen."""
    config = status.config
    table = Table(box=None, pad_edge=False)
    speeds = [column for column in SPEEDS if any(_seen(status, role, column[1]) for role in config.roles)]
    for title in ("agent", "step", "reward", "correct", "expert", "d_k", "copies", "dropped", "zero-adv", "entropy",
                  "clip", "lag", "idle", *(title for title, *_ in speeds), "ready", "taken"):  # fmt: skip
        table.add_column(title, justify="left" if title == "agent" else "right")
    roles: Mapping[str, Any] = (status.stats or {}).get("roles", {})
    for role in config.roles:
        if role not in config.training_roles:
            table.add_row(role, "frozen")
            continue

        def show(name: str, form: str = ".3f", role: str = role) -> str:
            value = status.value(f"{role}/{name}")
            return "-" if math.isnan(value) else f"{value:{form}}"

        queue = roles.get(role, {})
        table.add_row(
            role, f"{status.steps[role]}/{config.trainer.steps}", show("reward/mean"), show("reward/correct", ".2f"),
            show("reward/expert", ".2f"), show("d_k/mean", ".2f"), show("align/dup_ratio", ".0%"),
            show("align/drop_ratio", ".0%"), show("advantage/frac_zero", ".0%"), show("policy/entropy", ".2f"),
            show("loss/clip_ratio_high", ".3f"), show("staleness/max", ".0f"), show("perf/idle", ".0%"),
            *(show(name, form) for _, name, form in speeds),
            str(queue.get("ready", "-")), str(queue.get("leased", "-")),
        )  # fmt: skip
    found = timeline(status.recent, config.training_roles)
    bars = [Text(line) for line in as_text(found)] if found else []
    lines = [Text(line) for line in (_evaluations(status), *_services(status))]
    return Group(table, *lines, *bars, Text(_foot(status)))


def _seen(status: RunStatus, role: str, name: str) -> bool:
    return status.value(f"{role}/{name}") > 0


def _evaluations(status: RunStatus) -> str:
    parts = []
    for split in ("validation", "heldout"):
        found = [(m, status.values.get(f"eval/{split}/{m}")) for m in ("sampled", "greedy")]
        texts = [f"{mode} {known[1]:.3f}" for mode, known in found if known]
        step = next((known[0] for _, known in found if known), 0)
        if texts:
            parts.append(f"{split} at step {step}: {', '.join(texts)}")
    for name in sorted(n for n in status.values if n.startswith("eval/") and n.count("/") == 2):
        if name.endswith("/avg"):
            step, value = status.values[name]
            error = status.value(name.removesuffix("avg") + "stderr")
            spread = "" if math.isnan(error) else f" ± {error:.3f}"
            parts.append(f"{name.split('/')[1]} at step {step}: avg {value:.3f}{spread}")
    return "accuracy  " + ("; ".join(parts) or "not evaluated yet")


def _services(status: RunStatus) -> list[str]:
    """A line for each service that was asked, one for failed rollouts."""
    lines = []
    for name, known in sorted(status.services.items()):
        calls = known.get("calls", 0.0)
        recorded = known.get("cache", 0.0) + known.get("replay", 0.0)
        parts = [f"{calls:.0f} calls"] + ([f"{recorded / calls:.0%} recorded answers"] if calls else [])
        parts += [f"{known[c]:.0f} {c}" for c in ("retries", "failures", "outages") if known.get(c)]
        if known.get("live"):
            parts.append(f"{known.get('seconds', 0.0) / known['live']:.2f} s a live call")
        if known.get("waited"):
            parts.append(f"{clock(known['waited'])} waited")
        lines.append(f"service {clean(name)}: {', '.join(parts)}")
    kinds = [(k, status.value(f"rollout/failed_by_{k}")) for k in KINDS]
    if found := [f"{value:.0f} {kind}" for kind, value in kinds if value > 0]:
        lines.append(f"failed rollouts in the last report: {', '.join(found)}")
    return lines


def _foot(status: RunStatus) -> str:
    speed, left = status.value("rollout/perf/tok_per_s"), status.left()
    parts = [] if math.isnan(speed) else [f"{speed:.0f} sampled tokens/s"]
    if not math.isnan(busy := status.value("rollout/perf/busy")):
        parts.append(f"rollout places {busy:.0%} busy")
    if status.stats is not None:
        parts.append(f"groups: {status.stats['open']} in the making, {status.stats['sealed']} sealed")
        if status.stats["dropped"]:
            parts.append(f"{status.stats['dropped']} dropped")
    if not math.isnan(left) and left > 0 and status.state == "running":
        parts.append(f"{clock(left)} left")
    if status.missing and status.state == "running":
        parts.append(f"waiting for the external trainer of {', '.join(status.missing)}")
    if status.paused:
        parts.append(f"waiting for a service that is down: {', '.join(map(clean, status.paused))}")
    parts.append(clean(status.state))
    return "; ".join(parts)


def watch(run: Path, every: float, once: bool) -> None:
    """Show the run until Ctrl-C; once, or where the output is no terminal, a single time."""
    if every <= 0:
        raise ConfigError(f"--every {every:g}: expected more than 0 seconds")
    console = Console(highlight=False)
    with Watcher(run) as watcher:
        watcher.refresh()
        if once or not console.is_terminal:
            Console(highlight=False, width=max(console.width, 120)).print(render(watcher.status))
            return
        with Live(render(watcher.status), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                watcher.refresh()
                live.update(render(watcher.status), refresh=True)
