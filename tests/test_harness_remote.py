"""Rollouts that a program elsewhere claims: handed over once, answered, given back, refused to strangers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest

from mgrpo.errors import ConfigError, DeadlineError, InfrastructureError, ServiceError
from mgrpo.gateway.access import Access
from mgrpo.gateway.claimer import Claimer
from mgrpo.gateway.command import Command
from mgrpo.gateway.remote import Claims, Endpoint, settle
from mgrpo.gateway.scores import Answer
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, play
from mgrpo.services import outage
from tests import fake_clock
from tests.gateway_kit import until
from tests.harness_kit import Engine, KitTask, agents, ask, echo, program, rollout_of
from tests.research_kit import FIJI
from tests.runs import started

KEY = "MGRPO_TEST_HARNESS_KEY"
TEAM = """
ask("main", question["text"])
print("Nukualofa" if os.environ.get("MGRPO_TEST_HARNESS_KEY") is None else "it has the key")
"""

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


# -- the ready-made program ----------------------------------------------------------------------------------


def claimer(file: Path, said: list[str], key: str | None = None, **options: Any) -> Claimer:
    command = Command((sys.executable, "-S", str(file)))
    return Claimer(
        command, key, **{"concurrency": 2, "patience": 30.0, "say": said.append, "after": 0.1} | options
    )


def played_by(
    claims: Callable[[], Claimer], n: int = 4, engine: Engine | None = None, **options: Any
) -> list[RolloutResult]:
    """n rollouts, and a claimer that ends when the worker does."""

    async def main() -> list[RolloutResult]:
        async with worker(engine, **options) as (made, url):
            playing = asyncio.create_task(claims().play([url]))
            made.play(n)
            try:
                results = await made.results()
                await made.task.close()
                await asyncio.wait_for(playing, 60)
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
            return results

    return asyncio.run(main())


def test_the_claimer_plays_until_the_run_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands do not see the harness key; it says what became of each rollout."""
    monkeypatch.setenv(KEY, "open sesame")
    said: list[str] = []
    file = program(tmp_path, TEAM)
    results = played_by(lambda: claimer(file, said, "open sesame"), key_env=KEY)
    assert [rollout_of(result).correct for result in results] == [1.0] * 4
    assert sum("fiji-2: answered after" in line for line in said) == 4 and "the run is over" in said[-1]


def test_the_claimer_tells_failures_apart(tmp_path: Path) -> None:
    """A command that fails fails its rollout; one that asks for another try gets it."""
    said: list[str] = []
    failing = played_by(lambda: claimer(program(tmp_path, 'sys.exit("broken")'), said), 1)
    assert failing[0].kind == "task" and "ended with status 1: broken" in failing[0].failure
    once = f"""
if not os.path.exists({str(tmp_path / "tried")!r}):
    open({str(tmp_path / "tried")!r}, "w").close()
    sys.exit(75)
"""
    again = played_by(lambda: claimer(program(tmp_path, once + TEAM), said), 1)
    assert again[0].attempt == 1 and rollout_of(again[0]).correct == 1.0


def test_an_answer_that_the_gateway_has_no_room_for_fails_its_rollout(tmp_path: Path) -> None:
    """At once and by name; it is not taken for a program that fell silent."""
    file = program(tmp_path, 'ask("main", "x")\nsys.stdout.buffer.write(bytes([1]) * 900_000)')
    (failed,) = played_by(lambda: claimer(file, []), 1)
    assert failed.kind == "task" and "has no room for the command's answer" in failed.failure


def test_the_claimer_ends_a_command_whose_rollout_is_over(tmp_path: Path) -> None:
    """The deadline has passed: its place is free for the next."""
    said: list[str] = []
    file = program(tmp_path, 'ask("main", "x")\nsys.stdin.close()\nimport signal\nsignal.pause()')

    async def main() -> None:
        async with worker() as (made, url):
            playing = asyncio.create_task(claimer(file, said, concurrency=1, beats=600.0).play([url]))
            made.play(1, deadline=1.5)
            (result,) = await made.results()
            assert result.kind == "deadline"
            while not any("was over before it had ended" in line for line in said):
                await asyncio.sleep(0.01)
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)

    asyncio.run(main())


def test_a_claimer_that_is_stopped_gives_its_rollouts_back(tmp_path: Path) -> None:
    """Another one plays them."""
    said: list[str] = []
    hanging = tmp_path / "hanging"
    hanging.mkdir()
    slow = program(hanging, f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport signal\nsignal.pause()")
    quick = program(tmp_path, TEAM)

    async def main() -> None:
        async with worker() as (made, url):
            playing = asyncio.create_task(claimer(slow, said).play([url]))
            made.play(1)
            while not (tmp_path / "begun").exists():
                await asyncio.sleep(0.01)
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
            playing = asyncio.create_task(claimer(quick, said).play([url]))
            (result,) = await made.results()
            assert result.attempt == 1 and rollout_of(result).correct == 1.0
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)

    asyncio.run(main())


def test_the_claimer_names_what_it_cannot_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key, a server that is no such gateway, nobody at all."""
    monkeypatch.setenv(KEY, "open sesame")
    file, said = program(tmp_path, TEAM), list[str]()

    async def main(key: str | None, where: str = "") -> None:
        async with worker(key_env=KEY) as (_, url):
            await claimer(file, said, key, patience=0.2).play([where or url])

    with pytest.raises(ConfigError, match="refuses the harness key"):
        asyncio.run(main("wrong"))
    with pytest.raises(DeadlineError, match=r"http://127.0.0.1:9 has answered no claim for 0.2 s"):
        asyncio.run(main(None, "http://127.0.0.1:9"))


def test_the_claimer_names_a_server_that_is_no_gateway(tmp_path: Path) -> None:
    """Which has a page for everything."""

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\n<p>Hi</p>")
        await writer.drain()
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(page, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await claimer(program(tmp_path, TEAM), []).play([f"http://127.0.0.1:{port}"])

    with pytest.raises(ConfigError, match="is no gateway: its answer is no JSON object"):
        asyncio.run(main())


def test_the_command_line(tmp_path: Path) -> None:
    """`mgrpo gateway` plays a rollout, refuses what it cannot start, and SIGTERM ends it."""
    file = program(tmp_path, TEAM)

    async def main() -> None:
        async with worker() as (made, url):
            made.play(1)
            words = [
                sys.executable,
                "-m",
                "mgrpo",
                "gateway",
                url,
                "--command",
                f"{sys.executable} -S {file}",
            ]
            with started(words) as process:
                (result,) = await made.results()
                assert rollout_of(result).correct == 1.0
                process.terminate()
                output = await asyncio.to_thread(process.communicate, timeout=60)
                assert process.returncode == 130, output

    asyncio.run(main())
    for words, expected in (
        (["http://127.0.0.1:9", "--command", "no-such-program x"], "there is no such program"),
        (["127.0.0.1:9", "--command", "true"], "expected the address of a gateway"),
    ):
        with started([sys.executable, "-m", "mgrpo", "gateway", *words]) as process:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 2 and expected in output
