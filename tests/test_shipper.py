"""Shipping: what goes wrong is named at once, a dropped group is skipped, and nobody waits at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mgrpo.environments.episode import Episode
from mgrpo.errors import DeadlineError, PeerError
from mgrpo.pipeline.play import RolloutRequest, RolloutResult
from mgrpo.pipeline.shipper import Shipper
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.types import Rollout
from tests.play_kit import REQUEST, SlowEngine, one_turn, team
from tests.ship_kit import FakeLog, FakeStore, group


@contextmanager
def shipping(store: FakeStore, trajectory_log: Any, timeout: float = 60.0) -> Iterator[Shipper]:
    shipper = Shipper(store, {"main": trajectory_log}, lambda index, rollout: 1.0, timeout)  # type: ignore[arg-type]
    try:
        yield shipper
    finally:
        shipper.close()


def result(query: str, rollout: int = 0) -> RolloutResult:
    """A finished rollout without sub-agents."""

    async def run() -> Rollout:
        episode = Episode(query, rollout, team(SlowEngine()), 1)
        await one_turn(episode, "main")
        return episode.finish(1.0)

    return RolloutResult(RolloutRequest(query, REQUEST.question, rollout), 0, asyncio.run(run()))


def test_the_rest_of_a_dropped_group_is_left_out() -> None:
    """Its records are refused once and not sent any more; the other group arrives, and the dropped one is counted."""
    store, trajectory_log = FakeStore(closed=("old",)), FakeLog("main")
    old, new = group("old"), group("new")
    with shipping(store, trajectory_log) as shipper:
        shipper.ship(old, result("old", 0))
        shipper.drain()
        sent = len(store.records)
        shipper.ship(old, result("old", 1))
        shipper.ship(new, result("new", 0))
        shipper.drain()
        assert store.records[sent:] == [("invocation_done", "new", 0), ("rollout_final", "new", 0)]
        assert [t.query for t in trajectory_log.kept] == ["old", "new"]
        assert shipper.closed_groups() == 1 and shipper.closed_groups() == 0


def test_a_silent_trajectory_log_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The role, its address and how many rollouts wait; whoever ships or waits afterwards hears the same."""
    monkeypatch.setattr("mgrpo.pipeline.shipper.GRACE", 0.0)
    with shipping(FakeStore(), FakeLog("main", silent=True), timeout=0.2) as shipper:
        shipper.ship(group("q"), result("q"))
        words = (
            r"the trajectory log of 'main' at tcp://10\.0\.0\.7/main took no record within 0\.2 s; "
            r"1 finished rollouts"
        )
        with pytest.raises(DeadlineError, match=words):
            shipper.drain()
        with pytest.raises(DeadlineError, match=words):
            shipper.ship(group("q"), result("q", 1))


def test_a_trainer_that_is_gone_is_named(tmp_path: Path) -> None:
    """Over the real link: the client's own error, with the role, the address, and how many rollouts wait."""
    url = f"ipc://{tmp_path}/gone"
    trajectory_log = TrajectoryLogClient(url, digest="d", role="main", timeout=0.3)
    try:
        with shipping(FakeStore(), trajectory_log, timeout=0.3) as shipper:
            for k in range(2):
                shipper.ship(group("q"), result("q", k))
            with pytest.raises(
                DeadlineError, match=f"trajectory log of main at {url}.*finished rollouts wait for it"
            ):
                shipper.drain()
    finally:
        trajectory_log.close()


@pytest.mark.parametrize("busy", [False, True])
def test_leaving_waits_for_nothing(busy: bool, caplog: pytest.LogCaptureFixture) -> None:
    """close() ends the thread whatever it waits for, and says what was not delivered."""
    store = FakeStore()
    with shipping(store, FakeLog("main", silent=True), timeout=3600.0) as shipper:
        if busy:
            shipper.ship(group("q"), result("q"))
        shipper.close()
        assert not shipper._thread.is_alive()
        assert ("1 finished rollouts were not delivered" in caplog.text) == busy
        with pytest.raises(PeerError, match="closed"):
            shipper.ship(group("q"), result("q", 1))


def test_waiting_ends_with_what_the_caller_checks() -> None:
    """A worker that is told to leave does not wait for the trajectory log's deadline."""

    class Told(Exception):
        pass

    def check() -> None:
        raise Told

    with shipping(FakeStore(), FakeLog("main", silent=True), timeout=3600.0) as shipper:
        shipper.ship(group("q"), result("q"))
        with pytest.raises(Told):
            shipper.drain(check)


def test_a_failure_in_any_language_reaches_the_store() -> None:
    """The store takes reasons of 256 bytes; a longer one keeps the place at its end."""
    store = FakeStore()
    place = " (task.py:7, in play)"
    with shipping(store, FakeLog("main")) as shipper:
        shipper.ship(group("q"), RolloutResult(REQUEST, 0, None, "\u5929\u6c14 \ud800" * 100 + place, "task"))
        shipper.drain()
    assert len(store.reasons[0].encode()) <= 256 and store.reasons[0].endswith(place)
