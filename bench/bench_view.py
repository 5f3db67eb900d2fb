"""The run page: how soon a run of 10,000 rollouts is open, and what following it costs afterwards.

The run is a short one of tests/relay.toml whose record is written again until it has that many rollouts. It has the
spans of as many, ten turns each, 256 at once on two workers, made up for three trainers' 40 steps. Figures are
medians of several tries, wall time where nothing else is said; "open" is from the address being typed into a headless
chromium, at a server that was just started, to the list of rollouts standing there.

    python -m bench.bench_view [--quick] [--json PATH]
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.common import Report, parser
from mgrpo.view.data import RunView
from mgrpo.view.server import export
from tests.big_run import multiply
from tests.browser import MISSING, browser
from tests.fake_spans import trainer_spans, weight_spans, worker_spans, write_spans
from tests.runs import RELAY, train
from tests.test_view import served

ROLLOUTS = 10_000
ROLES, STEPS, SECONDS = ("main", "left", "right"), 40, 2400.0  # of the spans
SHOWN = "const c = document.getElementById('count'); return c && c.textContent"


def main() -> int:
    args = parser("How soon the page of a large run opens").parse_args()
    report = Report("bench_view")
    tries = 3 if args.quick else 7
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(RELAY, folder / "short", "trainer.steps=12", "trainer.minibatches=2")
        n = multiply(folder / "short", folder / "run", ROLLOUTS)
        add_spans(folder / "run", n)
        report.figure("rollouts in the record", n)
        size = sum(p.stat().st_size for p in (folder / "run").glob("**/*.rec"))
        report.figure("their record", size / 1e6, "MB", note="with spans")
        answers(report, folder / "run", tries)
        if MISSING:
            print(f"not measured in a browser: {MISSING}")
        else:
            in_browser(report, folder, tries)
    return report.finish(args)


def add_spans(run: Path, rollouts: int) -> None:
    """Of two workers and three trainers, in place of the short run's, and the times of their steps."""
    for path in run.glob("**/spans"):
        shutil.rmtree(path)
    for role in ROLES:
        write_spans(run, f"trainer {role}", trainer_spans(role, STEPS, SECONDS))
    each = SECONDS / STEPS
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1, STEPS + 1):
            times = {f"{role}/time/step": each for role in ROLES} | {
                f"{role}/time/train": 0.3 * each for role in ROLES
            }
            file.write(json.dumps({"step": step, "time": step * each, **times}) + "\n")
    loads = [span for role in ROLES for span in weight_spans(role, STEPS, SECONDS)]
    for worker in range(2):
        ids = [f"{i}/{worker}/0" for i in range(rollouts // 2)]
        write_spans(run, f"rollout-{worker}", worker_spans(worker, ids, 128, SECONDS, turns=10) + loads)


def answers(report: Report, run: Path, tries: int) -> None:
    """What the server computes: the first answer, and the next one of a page that has it all."""
    first, next_one, drawn = [], [], []
    length = picture = 0
    for _ in range(tries):
        began = time.process_time()
        view = RunView(run)
        length = len(json.dumps(view.overview()))
        first.append(time.process_time() - began)
        began = time.process_time()
        view.overview(len(view.ids()))
        next_one.append(time.process_time() - began)
        began = time.process_time()
        picture = len(json.dumps(view.timeline()))
        drawn.append(time.process_time() - began)
    report.figure(
        "first answer", 1e3 * statistics.median(first), "ms", note=f"CPU; {length / 1e6:.1f} MB of JSON"
    )
    report.figure("next answer", 1e3 * statistics.median(next_one), "ms", note="CPU; asked for every 2 s")
    note = f"CPU, beside the first answer; {picture / 1e6:.2f} MB of JSON"
    report.figure("timeline of the last steps", 1e3 * statistics.median(drawn), "ms", note=note)


def in_browser(report: Report, folder: Path, tries: int) -> None:
    file = folder / "run.html"
    began = time.perf_counter()
    export(folder / "run", file)
    report.figure("export", time.perf_counter() - began, "s", note=f"{file.stat().st_size / 1e6:.1f} MB")
    opened: list[float] = []
    from_disk: list[float] = []
    for number in range(tries):
        (folder / str(number)).mkdir()
        with served(folder / "run") as (url, _), browser(folder / str(number)) as page:
            for address, seconds in ((url, opened), (file.as_uri(), from_disk)):
                began = time.perf_counter()
                page.open(f"{address}#tab=rollouts")
                page.until(SHOWN)
                seconds.append(time.perf_counter() - began)
    report.figure("open", statistics.median(opened), "s", at_most=2.0, note="a server that was just started")
    report.figure("open the exported file", statistics.median(from_disk), "s", at_most=2.0)


if __name__ == "__main__":
    sys.exit(main())
