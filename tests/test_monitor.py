"""What the launcher makes of the reports: all of them, also of those it read in an earlier life, and none ends it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgrpo.config import load_config
from mgrpo.metrics import read_metrics
from mgrpo.run import monitor as module
from mgrpo.run.folder import RunFolder
from mgrpo.run.monitor import Monitor, Outcome
from mgrpo.run.progress import Display
from mgrpo.run.reports import every_report
from mgrpo.store.records import Control, Reported, World
from tests.runs import RELAY, summary

PAGE = 256


class Store:
    """A run's store as the launcher sees it: the reports that it still has."""

    def __init__(self) -> None:
        self.kept: list[Reported] = []
        self.state = "running"

    def report(self, kind: str, payload: Mapping[str, Any]) -> None:
        seq = self.kept[-1].seq + 1 if self.kept else 1
        self.kept.append(Reported(seq, "worker/rollout-0#a", kind, dict(payload)))

    def reports(self, after: int = 0, timeout: float = 0.0) -> list[Reported]:
        return [r for r in self.kept if r.seq > after][:PAGE]

    def create(self, params: object) -> None: ...

    def set_control(self, state: str, reason: str = "") -> None:
        self.state = state

    def world(self) -> World:
        return World(True, Control(self.state), [], 0, 0)

    def close(self) -> None: ...


def evaluation(split: str, step: int, accuracy: float) -> dict[str, Any]:
    return {
        "split": split, "step": step, "n": 8, "greedy": accuracy, "sampled": accuracy / 2, "failed": 0,
        "d_k": {"left": {"1": step}},
    }  # fmt: skip


def life(out: Path, store: Store, monkeypatch: pytest.MonkeyPatch, outcome: Outcome | None = None) -> str:
    """One launcher's life over the run in `out`; returns what it displayed. outcome: None, where it is killed."""
    monkeypatch.setattr(module, "LauncherClient", lambda *_, **__: store)
    text = io.StringIO()
    with Display(Console(file=text, width=200)) as display:
        watched = Monitor(load_config(RELAY, ["trainer.steps=1000"]), RunFolder(out), display)
        watched.connect(lambda: None, 1.0)
        assert watched.poll() is Outcome.RUNNING
        if outcome is not None:
            watched.close(outcome)
    return text.getvalue()


def filled(store: Store, first: int, last: int) -> None:
    """The reports of steps `first` to `last`, an evaluation every 25 steps."""
    for step in range(first, last + 1):
        for role in ("main", "left", "right"):
            metrics = {f"{role}/reward/mean": 0.5, f"{role}/d_k/mean": 1.0}
            store.report("step", {"role": role, "step": step, "metrics": metrics})
        store.report(
            "rollouts", {"step": step, "metrics": {"rollout/retokenization_mismatch": 3 if step == 5 else 0}}
        )
        if step % 25 == 0:
            store.report("eval", evaluation("validation", step, step / 1000))


@pytest.mark.parametrize("gone", [0, 450])
@pytest.mark.parametrize("ends", [Outcome.INTERRUPTED, None])
def test_a_resumed_summary_knows_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int, ends: Outcome | None
) -> None:
    """Three lives over 150 steps and far more than one page of reports, with and without the reports that the store
    deletes after a while: every evaluation, the start validation and the held-out scores from before RL are in
    the summary."""
    store = Store()
    store.report("eval", evaluation("heldout", 0, 0.25))
    store.report("eval", evaluation("validation", 0, 0.125))
    store.report("start_validation", {"valid": True, "figures": {}, "text": "fine"})
    filled(store, 1, 60)
    life(tmp_path, store, monkeypatch, ends)
    filled(store, 61, 120)
    life(tmp_path, store, monkeypatch, ends)
    del store.kept[:gone]
    filled(store, 121, 150)
    store.report("eval", evaluation("heldout", 150, 0.75))
    life(tmp_path, store, monkeypatch, Outcome.FINISHED)
    found = summary(tmp_path)
    assert found["valid"] and found["steps"] == 150 and found["retokenization_mismatch"] == 3
    assert found["heldout"]["start"] == {"greedy": 0.25, "sampled": 0.125}
    assert found["heldout"]["final"] == {"greedy": 0.75, "sampled": 0.375}
    expected = {0: 0.125} | {step: step / 1000 for step in range(25, 151, 25)}
    assert {int(step): a["greedy"] for step, a in found["validation"].items()} == expected
    assert found["d_k"] == {"left": {"1": 150}}
    seqs = [record["seq"] for record in read_metrics(tmp_path)]
    assert len(seqs) == len(set(seqs)) and seqs == sorted(seqs), "each report is written once"


def test_reports_that_were_never_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store deleted some while no launcher looked: the terminal says how many."""
    store = Store()
    filled(store, 1, 10)
    life(tmp_path, store, monkeypatch)
    filled(store, 11, 20)
    del store.kept[:45]
    assert "5 reports are missing" in life(tmp_path, store, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("step", {}),
        ("step", {"role": "main", "step": "three", "metrics": {}}),
        ("step", {"role": "main", "step": 3, "metrics": {"main/reward/mean": "high"}}),
        ("step", {"role": ["main"], "step": 3, "metrics": {}}),
        ("eval", {"split": "validation", "step": 3, "n": 8, "greedy": 0.5}),
        ("sft", {"role": "main", "step": 3, "loss": 0.1}),
        ("rollouts", {"step": 3, "metrics": [1, 2]}),
        ("start_validation", {"text": "no verdict"}),
        ("phase", {"text": "a word", "step": "none"}),
    ],
)
def test_a_malformed_report_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, payload: dict[str, Any]
) -> None:
    """A report of another version, or of none: its number, sender and fault are shown, and the next one counts."""
    store = Store()
    store.report(kind, payload)
    store.report("eval", evaluation("validation", 25, 0.5))
    shown = life(tmp_path, store, monkeypatch, Outcome.FINISHED)
    assert f"report 1 of worker/rollout-0#a ({kind!r}) is malformed" in shown
    assert summary(tmp_path)["validation"] == {"25": {"greedy": 0.5, "sampled": 0.25}}


def test_a_disk_that_takes_no_summary_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's end does not depend on what people look at."""
    store = Store()
    filled(store, 1, 2)
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "curves.png").mkdir()
    shown = life(tmp_path, store, monkeypatch, Outcome.FINISHED)
    assert "summary.json: not written" in shown and "curves.png: not written" in shown
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".partial")] == []


def test_pages_are_read_to_the_end() -> None:
    """More than two pages, and an end that falls on a page's."""
    store = Store()
    for number in range(2 * PAGE):
        store.report("phase", {"text": json.dumps(number)})
    found = [report.seq for report in every_report(store, -1)]  # type: ignore[arg-type]
    assert found == list(range(1, 2 * PAGE + 1))
