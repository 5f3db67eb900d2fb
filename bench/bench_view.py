"""The run page: how soon a run of 10,000 rollouts is open, and what following it costs afterwards.

The run is a short one of tests/relay.toml whose record is written again until it has that many rollouts. Figures are
medians of several tries, wall time where nothing else is said; "open" is from the address being typed into a headless
chromium, at a server that was just started, to the list of rollouts standing there.

    python -m bench.bench_view [--quick] [--json PATH]
"""

from __future__ import annotations

import json
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
from tests.runs import RELAY, train
from tests.test_view import served

ROLLOUTS = 10_000
SHOWN = "const c = document.getElementById('count'); return c && c.textContent"


def main() -> int:
    args = parser("How soon the page of a large run opens").parse_args()
    report = Report("bench_view")
    tries = 3 if args.quick else 7
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(RELAY, folder / "short", "trainer.steps=12", "trainer.minibatches=2")
        n = multiply(folder / "short", folder / "run", ROLLOUTS)
        report.figure("rollouts in the record", n)
        size = sum(p.stat().st_size for p in (folder / "run").glob("**/*.rec"))
        report.figure("their record", size / 1e6, "MB")
        answers(report, folder / "run", tries)
        if MISSING:
            print(f"not measured in a browser: {MISSING}")
        else:
            in_browser(report, folder, tries)
    return report.finish(args)


def answers(report: Report, run: Path, tries: int) -> None:
    """What the server computes: the first answer, and the next one of a page that has it all."""
    first, next_one, length = [], [], 0
    for _ in range(tries):
        began = time.process_time()
        view = RunView(run)
        length = len(json.dumps(view.overview()))
        first.append(time.process_time() - began)
        began = time.process_time()
        view.overview(len(view.ids()))
        next_one.append(time.process_time() - began)
    report.figure(
        "first answer", 1e3 * statistics.median(first), "ms", note=f"CPU; {length / 1e6:.1f} MB of JSON"
    )
    report.figure("next answer", 1e3 * statistics.median(next_one), "ms", note="CPU; asked for every 2 s")


def in_browser(report: Report, folder: Path, tries: int) -> None:
    file = folder / "run.html"
    began = time.perf_counter()
    export(folder / "run", file)
    report.figure("export", time.perf_counter() - began, "s", note=f"{file.stat().st_size / 1e6:.1f} MB")
    opened, from_disk = [], []
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
