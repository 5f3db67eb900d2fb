"""kill -9 of the store and of a trainer: short forms of what tests/chaos does at length."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.kills import STATIONS, kill_store, kill_trainer


def test_a_killed_store_has_every_record_it_acknowledged(tmp_path: Path) -> None:
    """Five kills under the load of four clients."""
    result = kill_store(tmp_path, kills=5, seed=1)
    assert result["acks"] > 1000
    assert (result["lost"], result["duplicates"], result["errors"]) == (0, 0, 0)


def test_a_trainer_killed_at_every_station_ends_with_the_same_weights(tmp_path: Path) -> None:
    """claimed, stepped, applied, checkpointed, committed: each group once, weights bit-equal to a quiet run."""
    steps = 6
    quiet = kill_trainer(tmp_path / "quiet", [], steps)
    killed = kill_trainer(tmp_path / "killed", [(s, 2 * (i // 2) + 1) for i, s in enumerate(STATIONS)], steps)
    assert killed["restarts"] == len(STATIONS)
    assert killed["weights"] == quiet["weights"]
    assert killed["trained"] == quiet["trained"] == [(i // 2, i) for i in range(2 * steps)]
