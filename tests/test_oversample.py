"""Runs with trainer.oversample: informative groups first, the rest set aside, and the record says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgrpo.cli.replay import replay_run
from tests.runs import ROOT, leftovers, records, summary, train


@pytest.mark.parametrize("lag", [0, 2])
def test_a_step_takes_the_informative_groups_of_its_pool(
    tmp_path: Path, lag: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six groups a step, four are trained on: every step to the last one, and what was trained on replays."""
    out = tmp_path / "run"
    settings = ("trainer.steps=6", "trainer.oversample=1.5", f"trainer.max_lag={lag}")
    train(ROOT / "tests" / "alone.toml", out, *settings, "trainer.checkpoint_every=2")
    data = summary(out)
    assert data["finished"] and data["steps"] == 6
    rows = [r for r in records(out) if "main/reward/mean" in r]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert (row["main/oversample/seen"], row["main/oversample/surplus"]) == (6, 2)
        assert 0 <= row["main/oversample/informative"] <= 6 and row["main/staleness/max"] <= lag
        if row["main/oversample/informative"] >= 4:  # each trained group has a trajectory with a gradient
            assert row["main/advantage/frac_zero"] < 1
    replay_run(out, [], sample=20, seed=1)
    assert capsys.readouterr().out.splitlines()[-1] == "20 rollouts: every stage bit-equal"
    assert leftovers(out) == []
