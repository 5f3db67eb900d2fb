"""Outages in rollouts, in the store and in a worker: they wait, lose nothing, and end by name where they must. Whole
runs: tests/test_recorded_run.py."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mgrpo
from mgrpo.config import load_config
from mgrpo.environments.episode import Episode
from mgrpo.errors import DeadlineError, ServiceError
from mgrpo.pipeline import worker_context
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, play_all
from mgrpo.pipeline.role_stream import RoleStream
from mgrpo.pipeline.worker_context import WorkerContext
from mgrpo.services import counters
from mgrpo.services.client import HttpService
from mgrpo.services.config import ServiceConfig
from mgrpo.store import records as rec
from mgrpo.store.server import StoreServer
from mgrpo.types import Rollout
from tests import fake_clock
from tests.fake_services import FakeService
from tests.play_kit import REQUEST, GivenTask, SlowEngine, one_turn, team
from tests.runs import RELAY
from tests.ship_kit import FakeStore
from tests.store_kit import DIGEST, publish, run_params
from tests.test_link import until
from tests.test_store_rules import Driver
from tests.upstream import Upstream, ask
from tests.worker_kit import Worker

# -- rollouts ----------------------------------------------------------------------------------------------------------


def rollouts(
    upstream: Upstream,
    n: int = 12,
    deadline: float | None = 8.0,
    tool_timeout: float | None = 4.0,
    **chosen: Any,
) -> tuple[list[RolloutResult], list[float]]:
    """The results of n rollouts at once, three searches and two turns each, and when each ended."""
    results: list[RolloutResult] = []
    times: list[float] = []

    async def main() -> None:
        service = upstream.service(backoff=0.5, **chosen)

        async def script(episode: Episode) -> Rollout:
            for turn in range(3):
                path = f"/{episode.rollout}/{turn}"
                await asyncio.sleep(0.3 * (1 + episode.rollout % 3))
                await episode.tool("search", ask, service, path, timeout=tool_timeout, attempts=1)
            await one_turn(episode, "sub")
            await one_turn(episode, "main")
            return episode.finish(1.0)

        async def done(result: RolloutResult) -> None:
            results.append(result)
            times.append(fake_clock.now())

        requests = [RolloutRequest("q", REQUEST.question, number) for number in range(n)]
        try:
            await play_all(GivenTask(script), requests, team(SlowEngine()), lambda r: 1, done, None, deadline)
        finally:
            await service.close()

    fake_clock.run(main())
    return results, times


def test_an_outage_of_a_minute_costs_a_rollout_nothing() -> None:
    """With 8 s a rollout and 4 s a call: all 12 end after the outage in their first attempt, none failed or late."""
    results, times = rollouts(Upstream((1.0, 61.0)))
    assert [(result.attempt, result.failure, result.rollout is not None) for result in results] == [
        (0, "", True)
    ] * 12
    assert all(result.rollout is not None and result.rollout.correct == 1.0 for result in results)
    assert min(times) >= 61.0 and max(times) < 61.0 + 46.0 + 8.0


def test_what_only_one_request_suffers_is_a_failed_rollout() -> None:
    """The service is up, but each rollout's second request is always answered with 500: it has failed after its three
    attempts, for infrastructure, and has no reward of 0."""
    upstream = Upstream()
    upstream.poison = {f"/{rollout}/1" for rollout in range(12)}
    results, _ = rollouts(upstream, deadline=None, tool_timeout=None)
    assert [(result.kind, result.rollout) for result in results] == [("infrastructure", None)] * 12


def test_an_outage_longer_than_max_outage_ends_the_worker() -> None:
    """The first rollout's ServiceError leaves play_all, which cancels the rest; none has failed for it."""
    with pytest.raises(ServiceError, match=r"'search' at http://search\.test was down for"):
        rollouts(Upstream((1.0, 1e9)), max_outage=30.0)


def test_a_call_that_hangs_is_late_all_the_same() -> None:
    """The deadline stands still for outages alone."""
    results, times = rollouts(Upstream(), n=1, deadline=0.65, tool_timeout=None)
    assert results[0].kind == "deadline" and times == pytest.approx([0.65])


# -- the store ---------------------------------------------------------------------------------------------------------


def test_groups_of_a_worker_that_waits_lose_no_time(tmp_path: Path) -> None:
    """Twenty minutes of sampling, an hour of waiting, twenty-nine more minutes: open, with 30 minutes for a group. What
    the wait does not excuse: another worker's group, and the same group half an hour after the last pause."""
    driver = Driver(tmp_path, k=2, batch=100, group_timeout_s=1800.0, heartbeat_timeout_s=30.0)
    driver.open("q0", 0)
    other = rec.OpenGroup("q1", 2, {}, 1)
    driver.core.handle("open_group", other, driver_sender("other"), driver.now)
    driver.wait(1200.0)
    for _ in range(480):
        driver.call("pause", None)
        driver.wait(7.5)
    assert world(driver).paused == ["w"] and driver.stats()["open"] == 1 and driver.stats()["dropped"] == 1
    driver.call("heartbeat", None)
    assert world(driver).paused == []
    driver.wait(29 * 60.0)
    assert driver.stats()["open"] == 1
    driver.wait(70.0)
    assert driver.stats()["open"] == 0
    driver.database.close()


def test_a_worker_that_died_while_it_waited_does_not_wait_any_more(tmp_path: Path) -> None:
    """Its last word was a pause: after heartbeat_timeout it is neither alive nor paused, and its group closes."""
    driver = Driver(tmp_path, k=2, batch=100, group_timeout_s=1800.0, heartbeat_timeout_s=30.0)
    driver.open("q0", 0)
    driver.call("pause", None)
    driver.wait(31.0)
    assert world(driver).paused == world(driver).workers == []
    driver.wait(1800.0)
    assert driver.stats()["open"] == 0
    driver.database.close()


def driver_sender(name: str) -> Any:
    from mgrpo.transport.codec import Sender

    return Sender(DIGEST, "worker", name, "s")


def world(driver: Driver) -> rec.World:
    found: rec.World = driver.call("wait", rec.WaitFor(0.0), "observer")
    return found


def test_a_worker_reports_what_it_waits_for(tmp_path: Path) -> None:
    """By itself, from be_alive() on and before any group: the store and people know of it, and of its end."""
    waits: list[str] = []
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(heartbeat_timeout_s=30.0)) as store:
        with publish(store.url, "main") as observer:
            with mgrpo.connect(store.url, role="worker", run=DIGEST, name="w", waits=lambda: waits) as worker:
                worker.be_alive()
                waits.append("waiting for service search")
                until(lambda: observer.world().paused == ["w"], "the pause")
                waits.clear()
                until(lambda: observer.world().paused == [], "its end")
                until(lambda: len(observer.reports()) == 2, "two lines for people")
            texts = [report.payload["text"] for report in observer.reports()]
    assert texts == ["worker w is waiting for service search", "worker w goes on: the services answer"]


def test_nobody_is_idle_while_a_worker_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer without groups and a worker without a new version wait for an hour beside a worker that waits for its
    service, and give up half an hour after it went on."""
    now = 0.0
    monkeypatch.setattr("mgrpo.pipeline.role_stream.time.monotonic", lambda: now)
    assert worker_context.time.monotonic() == 0.0

    class Store:
        def world(self) -> rec.World:
            paused = ["rollout-1"] if now < 3600.0 else []
            return rec.World(
                True, rec.Control("running"), [rec.RoleStatus("main", 0, 0, 0, 0, "")], 0, 0, paused=paused
            )

        def claim(self, n: int, timeout: float) -> list[object]:
            nonlocal now
            now += 1.0
            raise DeadlineError("fewer are sealed")

    stream = object.__new__(RoleStream)
    stream.role, stream.store = "main", Store()  # type: ignore[assignment]
    stream._config = load_config(RELAY, ["store.idle_timeout=1800"])
    with pytest.raises(DeadlineError, match=r"store\.idle_timeout"):
        stream.claim(3, lambda: True)
    assert 5400.0 <= now <= 5403.0
    now = 0.0
    parts: Any = SimpleNamespace()
    context = WorkerContext(stream._config, 0, parts, Store(), parts, parts, parts, parts)  # type: ignore[arg-type]
    with pytest.raises(DeadlineError, match="version 1"):
        for now in range(7200):  # noqa: B007 - the clock of all the above
            context.published()
            context.check_idle(1, since=0.0)
    assert 5400.0 <= now <= 5403.0


# -- a worker ----------------------------------------------------------------------------------------------------------


class Searching(GivenTask):
    """A search in each rollout, over a real socket."""

    def __init__(self, url: str, max_outage: float) -> None:
        config = ServiceConfig(url=url, attempts=3, backoff=0.05, max_outage=max_outage)
        self._search = HttpService("search", config)
        super().__init__(self._script)

    async def _script(self, episode: Episode) -> Rollout:
        path = f"/{episode.query}/{episode.rollout}/{episode.attempt}"
        await episode.tool("search", self._search.request, "GET", path, list, attempts=1)
        await one_turn(episode, "main")
        return episode.finish(1.0)

    async def close(self) -> None:
        await self._search.close()


def played_by_a_worker(folder: Path, task: Searching) -> tuple[FakeStore, dict[str, float]]:
    """The store of a worker that plays one group, and its metrics. Raises as the worker does."""
    worker = Worker(folder, task)
    worker.open("open")
    try:
        return worker.store, worker.play()
    finally:
        assert worker.store.reasons == []
        worker.context.loop.run(task.close())
        worker.close()


def test_a_worker_whose_service_is_down(tmp_path: Path) -> None:
    """Down for longer than max_outage: the worker ends by name, and the store has heard of no failed rollout. The next
    one begins while the service is still down, for six requests: it waits and plays the same group to its end, in first
    attempts. The same as a whole run that is resumed: tests/test_recorded_run.py."""
    left = itertools.repeat("503")
    with FakeService([]) as search:
        search.fault_of = lambda asked: next(left, None)
        with pytest.raises(
            ServiceError, match=r"'search' at .* longer than max_outage = 0.3 s, .* status 503"
        ):
            played_by_a_worker(tmp_path, Searching(search.url, 0.3))
        left = iter(["503"] * 6)
        counters.take()
        store, metrics = played_by_a_worker(tmp_path, Searching(search.url, 60.0))
    ends = [record for record in store.records if record[0] != "invocation_done"]
    assert sorted(ends) == [("rollout_final", "0/0", 0), ("rollout_final", "0/0", 1)]
    assert metrics["rollout/failed"] == 0.0 and metrics["service/search/outages"] == 1.0
    assert {asked.path.rpartition("/")[2] for asked in search.requests} == {"0"}  # the attempt
