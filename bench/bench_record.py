"""What recording a run costs: CPU time of a step of RL, and bytes on the disk.

The run is the atlas example. A step's CPU time, all processes together, is the difference between a long and a short
run from the same policies, so that starting processes and evaluating do not count. The recorders' share of it is
measured by giving them everything that the long run recorded once more: the same calls with the same rollouts,
batches and spans.

    python -m bench.bench_record [--start RUN] [--quick] [--json PATH]

--start takes the policies that another atlas run began its RL with, instead of SFT first (two minutes).
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import Comparison, Report, parser
from mgrpo.config import RunConfig
from mgrpo.pipeline.replay import Replayer
from mgrpo.pipeline.step_record import StepRecorder
from mgrpo.record import spans
from mgrpo.record.reader import Recording
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.record.schema import RolloutBody
from mgrpo.record.segments import SegmentWriter
from mgrpo.record.span_reader import SpanReader
from mgrpo.run.folder import RunFolder, recorded_run
from mgrpo.trainers.base import Checkpoint
from mgrpo.trainers.torch.checkpoint import step_folders, step_of
from mgrpo.types import MAIN, Rollout, Trajectory
from tests.runs import ROOT, final_weights, train

ATLAS = ROOT / "examples" / "atlas" / "atlas.toml"
ROLES = ("main", "sub")
SHORT = 3  # steps


def cpu_of(out: Path, start: Path, steps: int, record: bool) -> float:
    """CPU seconds of a run of so many steps from the policies in `start`, all its processes together."""
    sets = [f"trainer.steps={steps}", f"record.enabled={str(record).lower()}"]
    sets += ["eval.start_validation=0", "eval.every=1000", "eval.heldout=1", "eval.validation=1"]
    for role in ROLES:
        policy = RunFolder(start).agent(role) / "start"
        sets += [
            f"agents.{role}.model={json.dumps(str(policy.resolve()))}",
            f"agents.{role}.sft.steps=0",
        ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    train(ATLAS, out, *sets, timeout=1800)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Again:
    """Records what a run has recorded once more, elsewhere; seconds: CPU time of the recorders alone."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.config: RunConfig = recorded_run(run)
        self._run, self._folder, self._recording = run, folder, Recording([run])
        self.seconds = 0.0

    def _timed(self, call: Callable[[], None]) -> None:
        began = time.process_time()
        call()
        self.seconds += time.process_time() - began

    def rollouts(self) -> int:
        """Of training; returns how many."""
        recorder = RolloutRecorder(self.config.record, self._folder / "rollouts", print)
        number = 0
        for recorded in self._recording.rollouts.values():
            head = recorded.head
            if head.split != "train":
                continue
            played, asked = (
                rebuilt(head.query, head.rollout, recorded.body(), head.correct),
                (head.question, head.gold),
            )
            place = (head.step, head.index, head.query, head.rollout)
            self._timed(lambda p=place, a=asked, r=played: recorder.train(*p, a, r, ""))  # type: ignore[misc]
            number += 1
        recorder.close()
        return number

    def spans(self) -> int:
        """Of every process, written once a second as there; returns how many."""
        number = 0
        for process, kept in SpanReader([self._run]).spans().items():
            log = spans.SpanLog(self.config.record, self._folder / process.replace(" ", "-"), process, print)
            spans.record_to(log)
            kept.sort(key=lambda span: span.end)
            number, written = number + len(kept), kept[0].end
            began = time.process_time()
            for span in kept:
                with spans.span(span.kind, span.name, span.lane) as args:
                    args.update(span.args)
                if span.end - written > spans.FLUSH_NS:
                    written = span.end
                    log.flush()
            log.close()
            self.seconds += time.process_time() - began
            spans.record_to(None)
        return number

    def steps(self) -> None:
        """Of every role, with its checkpoints."""
        replayer = Replayer(self.config, self._recording, RunFolder(self._run).agent)
        for role in ROLES:
            recorder = StepRecorder(self.config.record, self._folder / role, role, print)
            for (mine, number), recorded in self._recording.steps.items():
                if mine == role:
                    body = recorded.body()
                    batch, whole = replayer._build(role, number, body)
                    assert batch is not None and whole, (
                        f"step {number} of {role} cannot be built from the record"
                    )
                    self._timed(lambda r=recorder, b=batch, d=body: r.step(b, d.metrics, d.settings))  # type: ignore[misc]
            kept = RunFolder(self._run).agent(role) / "record" / "checkpoints"
            for checkpoint in (Checkpoint(path, step_of(path)) for path in step_folders(kept)):
                self._timed(lambda r=recorder, c=checkpoint: r.keep(c))  # type: ignore[misc]
            recorder.close()


def rebuilt(query: str, rollout: int, body: RolloutBody, correct: float) -> Rollout:
    trajectories = [t.trajectory(query, rollout) for t in body.trajectories]
    subs: dict[str, list[Trajectory]] = {}
    for t in trajectories:
        if t.role != MAIN:
            subs.setdefault(t.role, []).append(t)
    return Rollout(query, rollout, trajectories[0], subs, correct, body.info)


def rec_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("**/*.rec"))


def costs(report: Report, folder: Path, start: Path, steps: int) -> None:
    """Share of a step's CPU time, bytes, and that recording changes nothing."""
    cpu = {
        (n, record): cpu_of(folder / f"{n}-{record}", start, n, record)
        for n in (SHORT, steps)
        for record in (True, False)
    }
    step = {record: (cpu[steps, record] - cpu[SHORT, record]) / (steps - SHORT) for record in (True, False)}
    run = folder / f"{steps}-True"
    again = Again(run, folder / "again")
    number = again.rollouts()
    worker = again.seconds
    again.steps()
    recorders = again.seconds
    spans_count = again.spans()
    report.figure("CPU of a step, recording off", 1e3 * step[False], "ms", note="all processes together")
    report.figure(
        "CPU of a step, recording on", 1e3 * step[True], "ms", note="whole runs: the noise is in both"
    )
    report.figure("worker's recording", 1e3 * worker / steps, "ms", note=f"{number // steps} rollouts a step")
    report.figure(
        "trainers' recording", 1e3 * (recorders - worker) / steps, "ms", note="2 trainers, checkpoints"
    )
    note = (
        f"{spans_count // steps} spans a step, {1e6 * (again.seconds - recorders) / spans_count:.1f} us each"
    )
    report.figure("spans", 1e3 * (again.seconds - recorders) / steps, "ms", note=note)
    off = 1e3 * step[False]
    for what, seconds in (("spans", again.seconds - recorders), ("recording and spans", again.seconds)):
        taken = 1e3 * seconds / steps
        compared = Comparison(off + taken, floor=off, floor_name="recording off")
        share = 100 * taken / off
        report.compare(f"{what}, share of a step's CPU time", compared, value=share, unit="%", at_most=3.0)
    same = final_weights(run) == final_weights(folder / f"{steps}-False")
    report.figure("weights that recording changes", float(not same), at_most=0)
    rollouts = sum(p.stat().st_size for p in (run / "rollouts").glob("*/*.rec"))
    report.figure("bytes of a rollout, tokens kept", rollouts / number, "B")
    written = sum(rec_bytes(path) for path in run.glob("**/spans"))
    report.figure("bytes of a rollout's spans", written / number, "B", note="all spans of the run")
    bare = folder / "bare"
    quiet = again.config.record.model_copy(update={"tokens_every": 0})
    again.config = again.config.model_copy(update={"record": quiet})
    again._folder = bare
    again.rollouts()
    report.figure(
        "bytes of a rollout, numbers only", rec_bytes(bare) / number, "B", note="record.tokens_every = 0"
    )
    trainers = sum(p.stat().st_size for p in (run / "agents").glob("*/record/*.rec"))
    report.figure("bytes of a step, one trainer", trainers / steps / len(ROLES), "B")


def bound(report: Report, folder: Path) -> None:
    """A folder that was given five times what it may hold."""
    limit = 4_000_000
    writer, peak = SegmentWriter(folder, limit), 0
    for number in range(5 * limit // 2000):
        writer.append(f"{number}".encode(), bytes(1980))
        if number % 50 == 0:
            peak = max(peak, rec_bytes(folder))
    writer.close()
    note = "at its fullest, five times the bound written"
    report.figure("folder against record.max_mb", peak / limit, at_most=1.0, note=note)


def main() -> int:
    p = parser("What recording costs")
    p.add_argument("--start", metavar="RUN", type=Path, help="an atlas run to take the start policies from")
    args = p.parse_args()
    report = Report("bench_record")
    folder = Path(tempfile.mkdtemp(prefix="mgrpo-bench-"))
    try:
        start = args.start
        if start is None:
            start = folder / "start"
            train(
                ATLAS,
                start,
                "trainer.steps=1",
                "eval.start_validation=0",
                "eval.heldout=1",
                "eval.validation=1",
                timeout=1800,
            )
        costs(report, folder, start, 10 if args.quick else 40)
        bound(report, folder / "bound")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(main())
