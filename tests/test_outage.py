"""A service that is down: calls wait instead of failing, rollouts lose neither attempts nor time, and the run ends by
name only where it stays down."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.errors import InfrastructureError, ServiceError
from mgrpo.services import counters, outage
from mgrpo.services.cassette import Cassette
from mgrpo.services.client import HttpService
from mgrpo.services.failures import ServiceFailure
from tests import fake_clock
from tests.upstream import Upstream, ask, path_of

# -- clocks ------------------------------------------------------------------------------------------------------------


async def _wait(before: float, seconds: float) -> None:
    await asyncio.sleep(before)
    with outage.waiting():
        await asyncio.sleep(seconds)


def test_a_bound_does_not_run_while_a_call_waits() -> None:
    """Two seconds of work and a hundred of waiting fit into three; what is left afterwards is as before."""

    async def main() -> float:
        async with outage.timeout(3.0) as bound:
            await _wait(1.0, 100.0)
            assert (bound.paused(), outage.paused_seconds()) == (100.0, 100.0)
            await asyncio.sleep(1.0)
        assert not bound.expired()
        with pytest.raises(TimeoutError):
            async with outage.timeout(3.0) as late:
                await _wait(1.0, 100.0)
                await asyncio.sleep(2.5)
        assert late.expired() and outage.paused_seconds() == 0.0
        return fake_clock.now()

    assert fake_clock.run(main()) == pytest.approx(102.0 + 103.0)


def test_calls_that_wait_at_once_count_once() -> None:
    """Of three tasks that wait for 1..5, 3..9 and 20..21 s the clock stands still for 9: and only those of the blocks
    around them, not of another rollout's."""

    async def rollout() -> float:
        async with outage.timeout(13.5) as bound, outage.timeout(None) as inner:
            async with asyncio.TaskGroup() as group:
                for before, seconds in ((1.0, 4.0), (3.0, 6.0), (20.0, 1.0)):
                    group.create_task(_wait(before, seconds))
            assert inner.paused() == bound.paused() == 9.0
            return outage.paused_seconds()

    async def other() -> bool:
        try:
            async with outage.timeout(13.5) as bound:
                await asyncio.sleep(21.0)
        except TimeoutError:
            return bound.paused() == 0.0
        return False

    async def main() -> list[object]:
        return list(await asyncio.gather(rollout(), other()))

    assert fake_clock.run(main()) == [9.0, True]


@settings(max_examples=60, deadline=None)
@given(
    waits=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=5),
    bound=st.integers(1, 60),
)
def test_the_clock_is_that_of_the_seconds_without_a_wait(waits: list[tuple[int, int]], bound: int) -> None:
    """Against the seconds counted one by one: the bound passes in the first second that is the bound-th in which
    nothing waits, or the work ends before."""
    end = max(before + seconds for before, seconds in waits)
    waited = [any(before <= t < before + seconds for before, seconds in waits) for t in range(end)]
    free = [t for t in range(end) if not waited[t]]
    expected = free[bound - 1] + 1 if len(free) >= bound and free[bound - 1] + 1 < end else None

    async def main() -> float | None:
        try:
            async with outage.timeout(float(bound)):
                await asyncio.gather(*(_wait(float(before), float(seconds)) for before, seconds in waits))
        except TimeoutError:
            return fake_clock.now()
        return None

    found = fake_clock.run(main())
    if len(free) == bound and expected is None:  # both at the same moment: either is right
        return
    assert found == expected


def test_who_follows_a_call_waits_as_its_leader_does(tmp_path: Path) -> None:
    """Two rollouts ask for the same, the second in the middle of the outage: neither's clock runs while it lasts."""
    upstream = Upstream((0.0, 50.0))

    async def rollout(service: HttpService, begins: float) -> float:
        await asyncio.sleep(begins)
        async with outage.timeout(10.0):
            await ask(service, "/a")
            return outage.paused_seconds()

    async def main() -> list[float]:
        tape = Cassette(tmp_path / "tape.db", "record")
        service = upstream.service(tape)
        found = await asyncio.gather(rollout(service, 0.0), rollout(service, 20.0), rollout(service, 30.0))
        await service.close()
        tape.close()
        return found

    first, second, third = fake_clock.run(main())
    assert first > 40.0 and second == pytest.approx(
        first - 20.0, abs=3.0
    )  # less its attempts before the outage
    assert third == pytest.approx(second - 10.0, abs=1e-6)


# -- the breaker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [503, 429, 504, "refused", "page"])
def test_calls_wait_until_the_service_is_back(how: int | str) -> None:
    """Down from 5 to 65 s, with 40 calls that come every two seconds: all are answered, none fails, and the service is
    asked a few times only."""
    upstream = Upstream((5.0, 65.0), how=how)

    async def call(service: HttpService, number: int) -> float:
        await asyncio.sleep(2.0 * number)
        await ask(service, f"/{number}")
        return fake_clock.now()

    async def main() -> list[float]:
        service = upstream.service(backoff=0.5)
        ended = await asyncio.gather(*(call(service, number) for number in range(40)))
        assert outage.outages() == []
        await service.close()
        return ended

    counters.take()
    ended = fake_clock.run(main())
    counted = {name.rpartition("/")[2]: value for name, value in counters.take().items()}
    assert all(65.0 <= end <= 65.0 + 46.0 for end in ended[3:32])
    assert counted["calls"] == counted["live"] == 40.0 and counted["outages"] == 1.0
    assert "failures" not in counted and counted["waited"] > 20 * 30
    assert len([t for t in upstream.times if 5.0 <= t < 65.0]) <= 3 * 2 + 2 * 8


def test_probes_are_few_and_grow_apart() -> None:
    """One call at a time is let through, after pauses that double up to 30 s and differ by half at most."""
    upstream = Upstream((0.0, 400.0))

    async def main() -> None:
        service = upstream.service(backoff=1.0)
        await asyncio.gather(*(ask(service, f"/{number}") for number in range(8)))
        await service.close()

    fake_clock.run(main())
    probes = [t for t in upstream.times if 0.2 < t < 400.0]
    assert 12 <= len(probes) <= 32
    for number, (before, after) in enumerate(zip([0.1, *probes], probes, strict=False)):
        whole = min(1.0 * 2**number, 30.0)
        assert 0.5 * whole - 0.11 <= after - before <= 1.5 * whole + 0.21, (number, before, after)
    assert len(set(upstream.paths[8 : 8 + len(probes)])) == 8  # each has its turn


def test_calls_that_queue_for_a_place_wait_too() -> None:
    """Two places and twenty calls at once: four go out before the third failure, and then probes alone."""
    upstream = Upstream((0.0, 30.0))

    async def main() -> None:
        service = upstream.service(backoff=0.5, concurrency=2)
        await asyncio.gather(*(ask(service, f"/{number}") for number in range(20)))
        await service.close()

    fake_clock.run(main())
    assert len([t for t in upstream.times if t < 0.25]) == 4
    assert len([t for t in upstream.times if 0.25 <= t < 30.0]) <= 8


def test_a_service_that_stays_down_ends_the_run_by_name() -> None:
    """Every call that waits, and every later one, gets the same words: service, address, seconds, the last answer."""
    upstream = Upstream((0.0, 1e9))

    async def main() -> list[Any]:
        service = upstream.service(backoff=0.5, max_outage=45.0)
        calls = (ask(service, f"/{number}") for number in range(5))
        found = list(await asyncio.gather(*calls, return_exceptions=True))
        assert fake_clock.now() == pytest.approx(45.0, abs=1.0)
        asked = len(upstream.times)
        found += await asyncio.gather(ask(service, "/late"), return_exceptions=True)
        assert len(upstream.times) == asked
        await service.close()
        return found

    errors = fake_clock.run(main())
    assert (
        all(isinstance(error, ServiceError) for error in errors)
        and len({str(error) for error in errors}) == 1
    )
    for words in ("'search'", "http://search.test", "down for 45", "max_outage = 45 s", "status 503"):
        assert words in str(errors[0])
    assert outage.outages() == []


def test_one_request_that_always_fails_is_no_outage() -> None:
    """Its page is broken, the service is not: it fails by itself, whether others are asked meanwhile or not, and
    others wait for it a moment at most."""
    upstream = Upstream()
    upstream.poison = {"/poison", "/poison-2"}

    async def main() -> None:
        service = upstream.service(backoff=0.5, max_outage=20.0)
        await ask(service, "/good")
        began = fake_clock.now()
        failures = await asyncio.gather(
            *(ask(service, path) for path in sorted(upstream.poison)), return_exceptions=True
        )
        assert [type(failure) for failure in failures] == [ServiceFailure] * 2
        assert all(failure.others for failure in failures if isinstance(failure, ServiceFailure))
        assert fake_clock.now() - began < 30.0
        poisoned = asyncio.create_task(service.request("GET", "/poison", path_of))
        for number in range(20):
            await asyncio.sleep(0.3)
            before = fake_clock.now()
            await ask(service, f"/{number}")
            assert fake_clock.now() - before < 3.0
        with pytest.raises(InfrastructureError):
            await poisoned
        await service.close()

    fake_clock.run(main())


def test_a_late_answer_from_before_an_outage_costs_nobody_an_attempt_too_many() -> None:
    """An answer that was long under way comes between two failures of the only other request: that one is not lost for
    it, although fewer failures in a row than its attempts were seen since."""
    times: list[float] = []

    async def answer(request: httpx2.Request) -> httpx2.Response:
        times.append(fake_clock.now())
        if request.url.path == "/slow" and fake_clock.now() == 0.0:
            await asyncio.sleep(1.0)
        elif fake_clock.now() < 30.0:
            return httpx2.Response(503)
        return httpx2.Response(200, json={"path": request.url.path})

    async def main() -> None:
        service = Upstream().service(transport=httpx2.MockTransport(answer), backoff=4.0)
        await asyncio.gather(ask(service, "/slow"), ask(service, "/a"))
        await service.close()

    counters.take()
    fake_clock.run(main())
    assert counters.take()["service/search/live"] == 2.0 and len(times) >= 5


def test_a_single_attempt_is_one() -> None:
    """attempts = 1: a request that always fails does so at once, and does not hold up the service for ever."""
    upstream = Upstream()
    upstream.poison = {"/poison"}

    async def main() -> None:
        service = upstream.service(attempts=1)
        await ask(service, "/good")
        for _ in range(5):
            with pytest.raises(ServiceFailure):
                await ask(service, "/poison")
        await ask(service, "/good")
        await service.close()

    fake_clock.run(main())


def test_a_probe_whose_rollout_ends_is_followed_by_another() -> None:
    """The call that is let through is cancelled while it is under way; the next one is let through at once. Those that
    wait can be cancelled too, and leave nothing behind."""
    upstream = Upstream((0.0, 10.0), how="refused")  # the first probe comes after 15 to 45 s

    async def main() -> None:
        service = upstream.service(backoff=30.0)
        tasks = [asyncio.create_task(ask(service, f"/{number}")) for number in range(6)]
        probes = len(upstream.times)
        await asyncio.sleep(1.0)
        tasks[5].cancel()
        while len(upstream.times) == 6 + probes:
            await asyncio.sleep(0.05)
        number = int(upstream.paths[-1][1:])
        tasks[number].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(value, asyncio.CancelledError) for value in found].count(True) == 2
        assert fake_clock.now() < 46.0  # one pause: the probe that ended without a word cost nothing
        await service.close()

    fake_clock.run(main())


def test_a_probe_keeps_retry_after() -> None:
    """The service asks for 25 s: it is left alone for as long, but never beyond the outage's end."""
    upstream = Upstream((0.0, 30.0), how=429, retry_after="25")

    async def main() -> None:
        service = upstream.service(attempts=2, backoff=0.1)
        await asyncio.gather(*(ask(service, f"/{number}") for number in range(3)))
        await service.close()

    fake_clock.run(main())
    assert [t for t in upstream.times if 0.0 < t < 50.0] == pytest.approx([25.1])

    async def short() -> None:
        service = Upstream((0.0, 1e9), how=429, retry_after="86400").service(attempts=2, max_outage=60.0)
        with pytest.raises(ServiceError, match="down for 60"):
            await ask(service, "/a")
        await service.close()

    fake_clock.run(short())


def test_time_in_which_nobody_asks_is_no_outage() -> None:
    """A trainer's step of an hour lies between two rollouts: the next call probes, and has its whole patience."""
    upstream = Upstream((0.0, 3610.0))

    async def main() -> None:
        service = upstream.service(backoff=0.5, max_outage=30.0)
        tasks = [asyncio.create_task(ask(service, f"/{number}")) for number in range(3)]
        await asyncio.sleep(5.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert outage.outages() == []  # it is down, and nobody waits
        await asyncio.sleep(3600.0 - fake_clock.now())
        await ask(service, "/later")
        assert fake_clock.now() < 3630.0
        await service.close()

    fake_clock.run(main())


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 40)), max_size=4),
    calls=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    attempts=st.integers(2, 6),
    concurrency=st.integers(1, 4),
)
def test_no_call_is_lost_to_outages(
    spans: list[tuple[float, float]], calls: list[float], attempts: int, concurrency: int
) -> None:
    """Whenever the service is down, and whenever it is asked: each call is answered in the end, or has made all its
    attempts, of which none fell into a time when the breaker was open."""
    upstream = Upstream(*((start, start + length) for start, length in spans))

    async def call(service: HttpService, number: int, at: float) -> object:
        await asyncio.sleep(at)
        try:
            return await ask(service, f"/{number}")
        except ServiceFailure as failure:
            assert failure.attempts >= attempts
            return failure

    async def main() -> list[object]:
        service = upstream.service(attempts=attempts, concurrency=concurrency, max_outage=1e4)
        found = await asyncio.gather(*(call(service, number, at) for number, at in enumerate(calls)))
        assert outage.outages() == []
        await service.close()
        return list(found)

    found = fake_clock.run(main())
    if len(spans) <= 1:  # one outage, however long: nothing is lost
        assert [value for value in found if isinstance(value, ServiceFailure)] == []
