"""What the launcher knows of a run: only what the processes report through the store.

The monitor turns reports into terminal lines, metrics (metrics.jsonl and sinks), curves.png and summary.json. It
remembers the last report it has written down, so a resumed run appends and repeats nothing.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgrpo.config import RunConfig
from mgrpo.errors import DeadlineError, PeerError
from mgrpo.files import remove_partials
from mgrpo.metrics import MetricsWriter, read_metrics
from mgrpo.run.folder import RunFolder
from mgrpo.run.processes import run_params
from mgrpo.run.progress import Display, step_line
from mgrpo.run.reports import MALFORMED, every_report, values_of
from mgrpo.run.signs import Signs
from mgrpo.run.summary import draw_curves, read_summary, write_summary
from mgrpo.sinks.base import MetricSink, RunInfo
from mgrpo.sinks.registry import open_sinks
from mgrpo.store.client import LauncherClient
from mgrpo.transport.keys import client_keys

ASK_SECONDS = 1.0  # for one answer of the store: whoever waits for it does not restart what has died
SILENT_SECONDS = 10.0  # between two lines about a store that does not answer


class Outcome(enum.Enum):
    """How a run stands."""

    RUNNING = "running"
    FINISHED = "finished"
    INVALID = "invalid"  # the start validation did not pass
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Monitor:
    """Follows one run from its store."""

    def __init__(self, config: RunConfig, folder: RunFolder, display: Display) -> None:
        self._config, self._folder, self._display = config, folder, display
        self._metrics: MetricsWriter | None = None
        self._seen, before = _written_so_far(folder.root)
        self._began = time.monotonic() - before
        self._client: LauncherClient | None = None
        self.answered = self._complained = time.monotonic()  # when the store last did, when we last missed it
        self._progress = Progress()
        self.advanced: set[str] = set()  # names of parts, until whoever restarts them takes them from here
        self._summary = _Summary(config)
        self._signs = Signs()
        self.reason = ""
        self.trainers: list[str] | None = None  # roles whose trainer is there; None: the store did not answer

    def connect(self, check: Callable[[], object], seconds: float) -> None:
        """Wait for the store; `check` is called meanwhile and raises when there is no hope. Nothing is written before
        the store has accepted the run."""
        began = time.monotonic()
        addresses = self._folder.addresses(self._config)
        self._client = LauncherClient(
            addresses.store, "launcher", timeout=ASK_SECONDS, key=client_keys(addresses, "launcher")
        )
        while True:
            try:
                self._client.create(run_params(self._config))
                break
            except (DeadlineError, PeerError) as error:
                check()
                if time.monotonic() - began > seconds:
                    raise
                self._complain(error, began)
        self.answered = time.monotonic()
        self._metrics = MetricsWriter(self._folder.root, self._warn, self._open_sinks())
        self._client.set_control("running", "")
        with contextlib.suppress(OSError):
            remove_partials(self._folder.root)
        # A resumed run: what its earlier parts said, for the summary. The store keeps the latest reports only.
        self._summary.restore(self._folder.root)
        for report in every_report(self._client, -1):
            if report.seq > self._seen:
                break
            self._summary.take(report.kind, report.payload)
            self._signs.take(report.kind, report.payload)

    def _open_sinks(self) -> dict[str, MetricSink]:
        metrics, root = self._config.metrics, self._folder.root
        name = metrics.name or root.resolve().name
        run = RunInfo(root, metrics.project, name, self._config.model_dump(mode="json"))
        return open_sinks(metrics.sinks, run, self._warn)

    def poll(self) -> Outcome:
        """Take in what is new and say how the run stands."""
        assert self._client is not None, "connect() comes first"
        try:
            # The state is read before the reports: whoever ends a run reports first and ends it then.
            world = self._client.world()
            control, self.trainers = world.control, world.trainers
            fresh = list(every_report(self._client, self._seen))
        except (DeadlineError, PeerError) as error:
            self.trainers = None
            self._complain(error, self.answered)
            return Outcome.RUNNING
        self.answered = time.monotonic()
        if fresh and (lost := fresh[0].seq - 1 - max(self._seen, 0)) > 0:
            self._warn(f"{lost} reports are missing: the store had deleted them before they were read")
        for report in fresh:
            self._seen = report.seq
            self._summary.take(report.kind, report.payload)
            if self._progress.take(report.source, report.kind, report.payload):
                self.advanced.add(part_of(report.source))
            self._take(report.seq, report.source, report.kind, report.payload)
        if control.state == "running":
            return Outcome.RUNNING
        self.reason = control.reason
        if control.state == "finished":
            return Outcome.FINISHED
        return Outcome.INVALID if self._summary.start_failed else Outcome.FAILED

    def end(self, reason: str) -> None:
        """The run stops here, for now: those that the launcher does not start learn it from the store."""
        assert self._client is not None, "connect() comes first"
        try:
            if self._client.world().control.state == "running":
                self._client.set_control("stopping", reason)
        except (DeadlineError, PeerError) as error:
            self._complain(error, self.answered)

    def _complain(self, error: Exception, since: float) -> None:
        """The store is silent: say so now and then, not of every restart."""
        now = time.monotonic()
        if now - max(since, self._complained) > SILENT_SECONDS:
            self._complained = now
            self._display.line(f"no answer from the store for {now - since:.0f} s: {error}", "yellow")

    def close(self, outcome: Outcome) -> None:
        """Write what people will look at, and say where it is. A resumed run that the store never accepted keeps the
        summary that it has."""
        if self._client is not None:
            self._client.close()
        if self._metrics is not None:
            self._metrics.close()
        elif self._folder.summary.exists():
            return
        seconds = time.monotonic() - self._began
        summary = self._summary.result(seconds, outcome is Outcome.FINISHED)
        try:
            write_summary(self._folder.root, summary | {"outcome": outcome.value, "reason": self.reason})
        except OSError as error:
            self._warn(f"{self._folder.root / 'summary.json'}: not written: {error.strerror}")
        heldout = summary["heldout"]
        if heldout["final"] is not None:
            final, start = heldout["final"], heldout["start"] or {}
            for mode in ("sampled", "greedy"):
                was = f", was {start[mode]:.3f} before RL" if mode in start else ""
                self._display.line(f"held-out accuracy, {mode}: {final[mode]:.3f}{was}", "bold")
        try:
            picture = draw_curves(self._folder.root, f"{self._folder.root}  (seed {self._config.seed})")
        except OSError as error:
            picture = None
            self._warn(f"{self._folder.root / 'curves.png'}: not written: {error.strerror}")
        if picture is not None:
            self._display.line(f"curves: {picture}")
        self._display.line(f"summary: {self._folder.summary}  ({seconds:.0f} s)")

    def _warn(self, line: str) -> None:
        self._display.line(line, "yellow")

    def _take(self, seq: int, source: str, kind: str, payload: Mapping[str, Any]) -> None:
        """One report: a line for people, a record for machines."""
        trainer = self._config.trainer
        step = int(payload.get("step", 0))
        if kind == "step":
            role = payload["role"]
            left = self._display.advance(f"RL {role}", step, trainer.steps)
            self._display.line(step_line(role, step, trainer.steps, payload["metrics"], left))
        elif kind == "sft":
            role = payload["role"]
            left = self._display.advance(f"SFT {role}", step, payload["steps"])
            if step % 100 == 0 or step == payload["steps"]:
                self._display.line(
                    f"SFT {role:<6} {step:>4}/{payload['steps']}  loss {payload['loss']:.3f}"
                    + (f"  ({left})" if left else "")
                )
        elif kind == "eval":
            text = f"{payload['split']} accuracy at step {step}: "
            text += ", ".join(f"{m} {payload[m]:.3f}" for m in ("sampled", "greedy") if m in payload)
            self._display.line(f"{text}  ({payload['n']} questions)", "bold")
        elif kind == "eval_set":
            self._display.line(_set_line(step, payload), "bold")
        elif kind == "start_validation":
            self._display.line(f"start validation: {payload['text']}", "green" if payload["valid"] else "red")
        elif kind != "rollouts":
            style = "yellow" if kind == MALFORMED else "dim"
            self._display.line(str(payload.get("text", f"{source}: {kind}")), style)
        if (sign := self._signs.take(kind, payload)) is not None:
            self._display.line(sign, "yellow")
        step, values = values_of(kind, payload)
        if values and self._metrics is not None:
            self._metrics.write(step, time.monotonic() - self._began, values, seq)


def _set_line(step: int, payload: Mapping[str, Any]) -> str:
    """What a named evaluation set has shown, for people."""
    error = "" if payload["stderr"] is None else f" ± {payload['stderr']:.3f}"
    how = "greedy" if payload["mode"] == "greedy" else f"{payload['repeats']} sampled each"
    failed = f", {payload['failed']} rollouts failed" if payload["failed"] else ""
    text = f"{payload['split']} at step {step}: avg {payload['avg']:.3f}{error}"
    return f"{text}  ({payload['n']} questions, {how}{failed})"


def part_of(source: str) -> str:
    """The name of the process that a report is from: `trainer:main/trainer-main#session` -> `trainer-main`."""
    return source.rpartition("/")[2].partition("#")[0]


class Progress:
    """Tells what was never done before from what a part repeats after each restart."""

    def __init__(self) -> None:
        self._furthest: dict[tuple[str, ...], int] = {}

    def take(self, source: str, kind: str, payload: Mapping[str, Any]) -> bool:
        """Whether this report says that its part got further than any earlier life of it."""
        if (
            kind == "rollouts"
        ):  # of groups that are played once; a batch in which everything failed is no progress
            return float(payload["metrics"].get("rollout/perf/tok_per_s", 0.0)) > 0
        if kind not in ("sft", "step", "eval", "eval_set", "start_validation"):
            return False
        key = (part_of(source), kind, str(payload.get("role", "")), str(payload.get("split", "")))
        step = int(payload.get("step", 0))
        if step <= self._furthest.get(key, -1):
            return False
        self._furthest[key] = step
        return True


class _Summary:
    """Collects summary.json from the reports."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._heldout: dict[str, dict[str, float] | None] = {"start": None, "final": None}
        self._validation: dict[int, dict[str, float]] = {}
        self._sets: dict[str, dict[int, dict[str, float]]] = {}  # name of a named set -> step -> avg, stderr
        self._validated: dict[str, Any] | None = None
        self._d_k: dict[str, Any] = {}
        self._steps = dict.fromkeys(config.training_roles, 0)
        self._trained = False
        self._mismatch = 0

    @property
    def start_failed(self) -> bool:
        return self._validated is not None and not self._validated["valid"]

    def restore(self, root: Path) -> None:
        """Begin with what the run's folder holds: summary.json of the last part that ended by itself, and what was
        written to metrics.jsonl since."""
        before = read_summary(root)
        validated, d_k = before.get("start_validation"), before.get("d_k")
        self._validated = validated if isinstance(validated, dict) and "valid" in validated else None
        self._d_k = d_k if isinstance(d_k, dict) else {}
        self._trained = before.get("trained") is True
        for record in read_metrics(root):
            step = int(record["step"])
            for name, value in record.items():
                self._take_value(step, name, value)

    def _take_value(self, step: int, name: str, value: float | None) -> None:
        first, _, rest = name.partition("/")
        if value is None:
            return
        if name == "start_validation/valid":
            self._validated = self._validated or {"valid": bool(value)}
        elif name == "rollout/retokenization_mismatch":
            self._mismatch = max(self._mismatch, int(value))
        elif first == "eval":
            split, _, mode = rest.partition("/")
            if split in ("validation", "heldout"):
                self._accuracy(split, step)[mode] = float(value)
            elif mode in ("avg", "stderr"):
                self._sets.setdefault(split, {}).setdefault(step, {})[mode] = float(value)
        elif rest == "reward/mean" and first in self._steps:
            self._steps[first] = step
            self._trained = True

    def _accuracy(self, split: str, step: int) -> dict[str, float]:
        """Where the accuracies of one evaluation are kept, by mode."""
        if split == "heldout":
            when = "start" if step == 0 else "final"
            known = self._heldout[when] = self._heldout[when] or {}
            return known
        return self._validation.setdefault(step, {})

    def take(self, kind: str, payload: Mapping[str, Any]) -> None:
        self._trained = self._trained or kind in ("sft", "step")
        if kind == "start_validation":
            self._validated = dict(payload)
        elif kind == "step":
            self._steps[payload["role"]] = payload["step"]
        elif kind == "rollouts":
            self._mismatch = max(
                self._mismatch, int(payload["metrics"].get("rollout/retokenization_mismatch", 0))
            )
        elif kind == "eval":
            accuracy = {mode: payload[mode] for mode in ("greedy", "sampled")}
            self._accuracy(payload["split"], payload["step"]).update(accuracy)
            if payload["split"] == "heldout":
                self._d_k = payload["d_k"]

        elif kind == "eval_set":
            known = self._sets.setdefault(payload["split"], {}).setdefault(payload["step"], {})
            known.update({name: payload[name] for name in ("avg", "stderr") if payload[name] is not None})

    def result(self, seconds: float, finished: bool) -> dict[str, Any]:
        return {
            "heldout": self._heldout,
            "validation": {str(step): self._validation[step] for step in sorted(self._validation)},
            "sets": {
                name: {str(step): steps[step] for step in sorted(steps)}
                for name, steps in sorted(self._sets.items())
            },
            "valid": self._validated is not None and bool(self._validated["valid"]),
            "start_validation": self._validated,
            "finished": finished,
            "trained": self._trained,
            "d_k": self._d_k,
            "steps": min(self._steps.values(), default=0),
            "retokenization_mismatch": self._mismatch,
            "seconds": round(seconds, 1),
            "seed": self._config.seed,
        }


def _written_so_far(folder: Path) -> tuple[int, float]:
    """(last report that metrics.jsonl holds, seconds of the run so far); (-1, 0) for a new run."""
    seq, seconds = -1, 0.0
    for record in read_metrics(folder):
        seq, seconds = max(seq, int(record.get("seq") or -1)), max(seconds, float(record["time"]))
    return seq, seconds
