"""The store after power cuts: everything acknowledged is there, and the controls show that the test can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("apsw", reason="the power-cut simulator needs apsw")

from tests.powercut import cuts, work


def test_no_power_cut_loses_an_acknowledged_record(tmp_path: Path) -> None:
    """120 cuts at random moments of a run with WAL checkpoints; tests/chaos makes 1,200."""
    verdict = cuts(work(tmp_path, 1, 60, "FULL", True), tmp_path, 120, seed=2)
    assert verdict.acked > 1000
    assert (verdict.lost, verdict.corrupt) == (0, 0)


def test_synchronous_normal_loses_acknowledged_records(tmp_path: Path) -> None:
    """Control: without an fsync per commit the same cuts must lose something."""
    verdict = cuts(work(tmp_path, 1, 60, "NORMAL", True), tmp_path, 40, seed=2)
    assert verdict.lost > 0
    assert verdict.corrupt == 0


def test_a_disk_that_ignores_fsync_corrupts_the_store(tmp_path: Path) -> None:
    """Control: when syncs do nothing the same cuts must leave damaged files."""
    verdict = cuts(work(tmp_path, 1, 60, "FULL", False), tmp_path, 40, seed=2)
    assert verdict.corrupt > 0
