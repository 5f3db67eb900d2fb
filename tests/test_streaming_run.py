"""Whole runs with streaming rollouts: every group is trained once, and no token is older than max_lag."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from tests.runs import (
    RELAY,
    ROOT,
    command,
    kill,
    leftovers,
    processes_of,
    records,
    started,
    steps_of,
    summary,
    train,
    trained_ages,
    wait_for,
)
from tests.span_kit import check_spans


def groups_of(out: Path) -> tuple[Counter[str], Counter[int]]:
    """Deliveries by state, and of those that were trained how many each step of a role has."""
    with contextlib.closing(sqlite3.connect(out / "store.db")) as database:
        rows = list(database.execute("SELECT state, role, step FROM deliveries"))
    steps = Counter((role, step) for state, role, step in rows if state in ("applied", "committed"))
    return Counter(state for state, _, _ in rows), Counter(steps.values())


@pytest.mark.parametrize("window", [1, 3])
def test_an_agent_alone_streams(tmp_path: Path, window: int) -> None:
    """max_lag 2, also with a claim window: the bound is kept, evaluations are made on the way, the rollouts'
    load is reported."""
    out = tmp_path / "run"
    settings = ("trainer.max_lag=2", "trainer.steps=6", "eval.every=2", f"trainer.claim_window={window}")
    train(ROOT / "tests" / "alone.toml", out, *settings)
    data = summary(out)
    assert data["finished"] and data["steps"] == 6 and set(data["heldout"]) == {"start", "final"}
    ages = trained_ages(out)
    assert max(ages) <= 2 and min(ages) >= 0 and ages.total() == 6 * 4 * 4
    assert groups_of(out) == ({"committed": 6 * 4}, {4: 6})
    rows = records(out)
    busy = [r["rollout/perf/busy"] for r in rows if "rollout/perf/busy" in r]
    assert busy and all(0 <= share <= 1 for share in busy) and max(busy) > 0
    assert max(r["main/staleness/max"] for r in rows if "main/staleness/max" in r) <= 2
    check_spans(out, ("main",), 6)
    assert leftovers(out) == []


def test_two_workers_stream_for_three_agents_and_one_is_killed(tmp_path: Path) -> None:
    """A worker's death in the middle costs no group and doubles none, and the bound holds all the same."""
    out = tmp_path / "run"
    settings = ["trainer.max_lag=2", "rollout.workers=2", "trainer.steps=12", "rollout.concurrency=10"]
    with started(command("train", str(RELAY), "--out", str(out), *[f"--set={s}" for s in settings])) as run:
        wait_for(lambda: steps_of(out) >= 3 or run.poll() is not None, "step 3")
        if "rollout-1" in processes_of(out):
            kill(out, "rollout-1")
        output, _ = run.communicate(timeout=800)
    assert run.returncode == 0, output
    assert groups_of(out) == ({"committed": 3 * 12 * 4}, {4: 3 * 12})
    ages = trained_ages(out)
    assert max(ages) <= 2 and min(ages) >= 0
    assert leftovers(out) == []
