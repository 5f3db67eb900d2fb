"""Rollouts that a program elsewhere claims: handed over once, answered, given back, refused to strangers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx2
import pytest

from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.gateway.access import Access
from mgrpo.gateway.remote import Claims, Endpoint, settle
from mgrpo.gateway.scores import Answer
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, play
from mgrpo.services import outage
from tests import fake_clock
from tests.gateway_kit import until
from tests.harness_kit import Engine, KitTask, agents, ask, echo, rollout_of
from tests.research_kit import FIJI

KEY = "MGRPO_TEST_HARNESS_KEY"

ACCESS = Access("http://127.0.0.1:1/rollout/a/v1", "k")


class Worker:
    """A worker whose rollouts wait for programs."""

    def __init__(self, task: KitTask, engine: Engine) -> None:
        self.task, self.team = task, agents(engine)
        self.jobs: list[asyncio.Task[RolloutResult]] = []

    async def begin(self) -> str:
        """Start the server; its address."""
        await self.task.preflight()
        held = self.task._held
        assert held is not None
        return held.gateway.url

    def play(self, n: int = 1, deadline: float | None = None) -> None:
        """n more rollouts."""
        for number in range(len(self.jobs), len(self.jobs) + n):
            request = RolloutRequest("7/3", FIJI, number)
            self.jobs.append(asyncio.create_task(play(self.task, request, self.team, 1, None, deadline)))

    async def results(self) -> list[RolloutResult]:
        return list(await asyncio.gather(*self.jobs))


@asynccontextmanager
async def worker(engine: Engine | None = None, **options: Any) -> AsyncIterator[tuple[Worker, str]]:
    """With its address; it is closed, and nothing of it runs on."""
    made = Worker(KitTask({"remote": True, **options}, ("main", "sub")), engine or Engine(echo))
    try:
        async with asyncio.timeout(100):
            yield made, await made.begin()
    finally:
        for job in made.jobs:
            job.cancel()
        await asyncio.gather(*made.jobs, return_exceptions=True)
        await made.task.close()


@asynccontextmanager
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=60, trust_env=False, verify=False) as http:
        yield http


async def claimed(http: httpx2.AsyncClient, url: str, wait: float = 20.0) -> tuple[Access, dict[str, Any]]:
    """The next rollout: its base URL, and what came with it."""
    answer = await http.post(f"{url}/harness/claim", json={"wait": wait})
    assert answer.status_code == 200, answer.text
    offer = answer.json()
    return Access(offer["base_url"], offer["api_key"]), offer


def test_a_program_claims_plays_and_answers() -> None:
    """Each rollout goes to one program, with its question and without its answer; a second answer changes nothing."""

    async def main() -> None:
        async with worker() as (made, url), client() as http:
            made.play(2)
            offers = [await claimed(http, url), await claimed(http, url)]
            assert len({offer["rollout"] for _, offer in offers}) == 2
            for access, offer in offers:
                assert offer["question"]["text"] == FIJI.text and FIJI.answer not in str(
                    offer["question"]["text"]
                )
                assert set(offer["question"]) == {"text", "id", "info", "tags", "attachments"}
                await ask(access, "main", "x")
                for answer in (FIJI.answer, "no"):
                    told = await http.post(
                        f"{access.root}/answer", json={"answer": answer}, headers=access.headers
                    )
                    assert told.status_code in (200, 404)
            assert [rollout_of(result).correct for result in await made.results()] == [1.0, 1.0]
            nothing = await http.post(f"{url}/harness/claim", json={"wait": 0})
            assert nothing.status_code == 200 and nothing.json() == {"rollout": None}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ({"error": "out of ideas"}, "task", "the harness failed: out of ideas"),
        ({"error": "no network", "retry": True}, "infrastructure", "the harness failed: no network"),
    ],
)
def test_an_error_of_a_program_fails_its_rollout(body: dict[str, Any], kind: str, words: str) -> None:
    """At once, or after three attempts where it asks for them."""

    async def main() -> None:
        async with worker() as (made, url), client() as http:
            made.play()
            for _ in range(3 if kind == "infrastructure" else 1):
                access, _ = await claimed(http, url)
                await http.post(f"{access.root}/answer", json=body, headers=access.headers)
            (result,) = await made.results()
            assert (result.rollout, result.kind) == (None, kind) and words in result.failure

    asyncio.run(main())


def test_strangers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the harness key, with another rollout's key, for a rollout that is not there: nothing is claimed,
    nothing answered. Bodies that are none are named."""
    monkeypatch.setenv(KEY, "open sesame")

    async def main() -> None:
        async with worker(key_env=KEY) as (made, url), client() as http:
            made.play(2)
            for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "open sesame"}):
                answer = await http.post(f"{url}/harness/claim", json={"wait": 0}, headers=headers)
                assert answer.status_code == 401
            http.headers["Authorization"] = "Bearer open sesame"
            for wait in (-1, 1000, "x", True):
                assert (await http.post(f"{url}/harness/claim", json={"wait": wait})).status_code == 400
            assert (await http.post(f"{url}/harness/claim", content=b"[1]")).status_code == 400
            (first, _), (second, _) = [await claimed(http, url), await claimed(http, url)]
            for what in ("answer", "alive"):
                for root, key in ((first.root, second.api_key), (f"{url}/rollout/none", first.api_key)):
                    headers = {"Authorization": f"Bearer {key}"}
                    answer = await http.post(f"{root}/{what}", json={"answer": 1}, headers=headers)
                    assert answer.status_code == 404
            for body in ({}, {"answer": 1, "more": 2}, {"error": 1}, {"error": "x", "retry": 1}):
                answer = await http.post(f"{first.root}/answer", json=body, headers=first.headers)
                assert answer.status_code == 400, body
            assert not any(job.done() for job in made.jobs)

    asyncio.run(main())


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_missing_key_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything listens."""
    monkeypatch.delenv(KEY, raising=False)
    if value is not None:
        monkeypatch.setenv(KEY, value)

    async def main() -> None:
        async with worker(key_env=KEY):
            raise AssertionError("it started")

    with pytest.raises(ConfigError, match=f"{KEY} is not set"):
        asyncio.run(main())


def test_a_program_that_falls_silent_loses_its_rollout() -> None:
    """After alive_seconds, of which a program that says that it is alive has seen any number."""

    async def main() -> float:
        claims = Claims(None, 600.0, 60.0)
        playing = asyncio.create_task(claims.play("a", FIJI, ACCESS))
        offer = await claims.claim(30.0)
        assert offer is not None and claims.find("a", "wrong") is None
        claims.confirm(offer)
        for _ in range(10):
            await asyncio.sleep(50.0)
            assert claims.find("a", "k") is offer
        with pytest.raises(InfrastructureError, match="no sign of life for 60 s"):
            await playing
        assert claims.find("a", "k") is None
        return fake_clock.now()

    assert fake_clock.run(main()) == 560.0


def test_a_claim_whose_client_has_gone_takes_no_rollout() -> None:
    """The rollout goes to the next that asks."""

    async def main() -> None:
        async with worker() as (made, url):
            async with client() as http:
                with pytest.raises(httpx2.ReadTimeout):
                    await http.post(f"{url}/harness/claim", json={"wait": 20}, timeout=0.3)
            made.play()
            async with client() as http:
                access, _ = await claimed(http, url)
                assert access.api_key

    asyncio.run(main())


def test_a_run_that_nobody_plays_ends_by_name() -> None:
    """Rollouts wait max_outage seconds for the first program, and as long again after the last has asked; their
    deadlines stand still meanwhile."""

    async def main() -> list[float]:
        claims, ends = Claims(None, 600.0, 60.0), []

        async def wait(name: str) -> None:
            async with outage.timeout(5.0):
                with pytest.raises(
                    ServiceError, match=r"no program has asked for a rollout at http://.* for 600 s"
                ):
                    await claims.play(name, FIJI, ACCESS)
            ends.append(fake_clock.now())

        await asyncio.gather(wait("a"), wait("b"))
        (late,) = [asyncio.create_task(wait("c"))]
        await asyncio.sleep(500.0)
        offer = await claims.claim(0.0)
        assert offer is not None
        claims.give_back(offer)
        await late
        return ends

    assert fake_clock.run(main()) == [600.0, 600.0, 1700.0]


def test_rollouts_wait_for_busy_programs() -> None:
    """Longer than max_outage, and than their deadline, as long as one plays."""

    async def main() -> None:
        claims = Claims(None, 10.0, 60.0)

        async def rollout(name: str) -> Answer:
            async with outage.timeout(300.0):
                return await claims.play(name, FIJI, ACCESS)

        first, second = (asyncio.create_task(rollout(name)) for name in "ab")
        for number, playing in enumerate((first, second)):
            offer = await claims.claim(1.0)
            assert offer is not None and offer.id == "ab"[number]
            claims.confirm(offer)
            for _ in range(5):
                await asyncio.sleep(50.0)
                claims.find(offer.id, "k")
            assert number or not (first.done() or second.done())
            settle(offer, {"answer": number})
            assert (await playing).value == number

    fake_clock.run(main())


def test_a_claim_that_is_cancelled_gives_its_rollout_back() -> None:
    """Between being handed over and being read."""

    async def main() -> None:
        claims = Claims(None, 60.0, 60.0)
        poll = asyncio.create_task(claims.claim(30.0))
        await asyncio.sleep(0)
        playing = asyncio.create_task(claims.play("a", FIJI, ACCESS))
        await asyncio.sleep(0)
        poll.cancel()
        await asyncio.gather(poll, return_exceptions=True)
        offer = await claims.claim(0.0)
        assert offer is not None and offer.id == "a"
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)

    asyncio.run(main())


class Claim:
    """A request for a rollout, whose client stays."""

    method, path = "POST", "/harness/claim"

    def header(self, name: bytes) -> str | None:
        return None

    def length(self) -> int | None:
        return 2

    async def parts(self) -> AsyncIterator[bytes]:
        yield b"{}"

    async def gone(self) -> None:
        await asyncio.Event().wait()


def test_a_claim_whose_request_is_cancelled_gives_its_rollout_back() -> None:
    """Its server ends the request in the moment in which the rollout is there."""

    async def main() -> None:
        claims = Claims(None, 60.0, 60.0)
        asked = asyncio.create_task(Endpoint(claims)(cast(Any, Claim())))
        await until(lambda: bool(claims._pollers))
        playing = asyncio.create_task(claims.play("a", FIJI, ACCESS))
        while claims._pollers or not claims._offers:  # until it has been handed over
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        offer = await claims.claim(0.0)
        assert offer is not None and offer.id == "a"
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)

    asyncio.run(main())
