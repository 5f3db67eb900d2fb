"""`mgrpo trace` on a large run: seconds, memory and bytes of a Perfetto file of 10,000 rollouts.

The spans are made up: two rollout workers of 32 places, each rollout with 10 turns and 9 tool calls of random length,
and a trainer that claims, trains and publishes every 640 rollouts.

    python -m bench.bench_trace [--quick] [--json PATH]
"""

from __future__ import annotations

import heapq
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.common import Report, parser
from mgrpo.config import dump_config, load_config
from mgrpo.config.run import RecordConfig
from mgrpo.record.spans import Args, Span, SpanLog
from mgrpo.trace.export import export
from tests.runs import RELAY

ROLLOUTS, TURNS, WORKERS, PLACES, STEP = 10_000, 10, 2, 32, 640
EPOCH, MS = 1_790_000_000_000_000_000, 1_000_000


def main() -> int:
    args = parser("What a trace of a large run costs").parse_args()
    report = Report("bench_trace")
    rollouts = ROLLOUTS // 10 if args.quick else ROLLOUTS
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        dump_config(load_config(RELAY), run / "config.json")
        make(run, rollouts)
        wall, cpu = time.perf_counter(), time.process_time()
        done = export([run], None, None, lambda written, total: None)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    report.figure("rollouts", done.counts["rollout"])
    report.figure("spans", sum(done.counts.values()))
    report.figure("CPU time", cpu, "s", at_most=60, note=f"{wall:.1f} s by the clock")
    report.figure("file", done.size / 1e6, "MB", at_most=50)
    report.figure("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "MB")
    return report.finish(args)


def make(run: Path, rollouts: int) -> None:
    """Write the record of spans of a run of so many rollouts."""
    for worker in range(WORKERS):
        spans = [span for rollout in played(worker, rollouts) for span in rollout]
        keep(run / "rollouts" / str(worker), f"rollout-{worker}", spans)
    trainer = []
    for step in range(rollouts // STEP):
        at = EPOCH + step * 20_000 * MS
        label: Args = {"version": step, "label": f"main.e1.v{step}"}
        trainer += [
            Span("publish", "main", "main", at, at + 100 * MS, label),
            Span(
                "claim", "main", "ahead", at + 100 * MS, at + 15_000 * MS, {"step": step, "groups": STEP // 8}
            ),
            Span("train", "main", "main", at + 15_000 * MS, at + 19_000 * MS, {"step": step}),
            Span("step", "main", "main", at + 100 * MS, at + 20_000 * MS, {"step": step}),
        ]
    keep(run / "agents" / "main" / "record", "trainer main", trainer)


def played(worker: int, rollouts: int) -> Iterator[list[Span]]:
    """The rollouts of a worker, each begun when one of its places is free."""
    noise = random.Random(worker)
    free = [EPOCH + place for place in range(PLACES)]
    for number in range(worker, rollouts, WORKERS):
        start = at = heapq.heappop(free)
        lane = f"{number // STEP}/{number // 8}/{number % 8}"
        own: Args = {"role": "main", "invocation": 0, "attempt": 0}
        spans = []
        for turn in range(TURNS):
            if turn:
                end = at + int(noise.expovariate(1 / 100) * MS)
                spans.append(Span("tool", "search", lane, at, end, {"attempt": 0, "retries": 0, "failed": 0}))
                at = end
            end = at + int(noise.expovariate(1 / 200) * MS)
            sampled: Args = {"turn": turn, "context": 90 * turn, "sampled": 64, "version": number // STEP}
            spans.append(Span("turn", "main", lane, at, end, own | sampled))
            at = end
        ended: Args = {"split": "train", "status": "ok", "failed_by": "", "correct": 1.0, "attempts": 1}
        yield [
            *spans,
            Span("invocation", "main", lane, start, at, own),
            Span("rollout", lane, lane, start, at + MS, ended),
        ]
        heapq.heappush(free, at + 2 * MS)


def keep(folder: Path, process: str, spans: list[Span]) -> None:
    log = SpanLog(RecordConfig(), folder, process, lambda line: sys.exit(line))
    for span in sorted(spans, key=lambda span: span.end):
        log.add(span)
    log.close()


if __name__ == "__main__":
    sys.exit(main())
