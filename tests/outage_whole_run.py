"""A whole run whose service is down: python -m tests.outage_whole_run (two launches, 40 s of one core).

What its parts do is in tests/test_outage.py and tests/test_outage_run.py, without the launcher.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import tempfile
from pathlib import Path

from tests import search_task
from tests.fake_services import FakeService
from tests.runs import RELAY, command, leftovers, records, resume, started, steps_of, summary

ALONE = RELAY.with_name("alone.toml")
STEPS = 2


def run(folder: Path) -> None:
    """Down in the middle of a run, and for longer than max_outage: it ends with status 2 in plain words. Resumed while
    the service is still down, for eight requests, it waits and goes on: every rollout is there, in its first attempt,
    and none has failed."""
    out, left = folder / "run", itertools.repeat("503")
    with FakeService({"hits": []}) as search:
        search.fault_of = lambda asked: next(left, None) if asked.path.startswith("/1/") else None
        sets = ["task.name=tests.search_task:SearchTask", f"task.options.url={search.url}"]
        sets += [f"trainer.steps={STEPS}", "trainer.questions=2", "trainer.group_size=2", "metrics.sinks=[]"]
        sets += ["eval.start_validation=0", "eval.validation=1", "eval.heldout=1", "record.enabled=false"]
        first = command("train", str(ALONE), "--out", str(out), *(f"--set={text}" for text in sets))
        with started(first, env={search_task.MAX_OUTAGE: "1"}) as process:
            output, _ = process.communicate(timeout=300)
        assert process.returncode == 2, output
        assert "service 'search' at" in output and "max_outage = 1 s" in output and "status 503" in output
        left = iter(["503"] * 8)
        resume(out)
    assert "answers again after" in (out / "logs" / "rollout-0.log").read_text()
    assert steps_of(out) == STEPS and summary(out)["outcome"] == "finished"
    assert {asked.path.rpartition("/")[2] for asked in search.requests} == {"0"}  # the attempt
    with contextlib.closing(sqlite3.connect(out / "store.db")) as database:
        kinds = database.execute("SELECT kind, count(*) FROM rollouts GROUP BY kind").fetchall()
        states = database.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall()
    assert kinds == [("final", 4 * STEPS)] and states == [("sealed", 2 * STEPS)]
    reported = [record for record in records(out) if "rollout/failed" in record]
    assert reported and all(record["rollout/failed"] == 0 for record in reported)
    assert sum(record.get("service/search/outages", 0) for record in reported) == 1.0
    assert leftovers(out) == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        run(Path(made))
    print("the run ended by name, was resumed, waited, and lost nothing")
