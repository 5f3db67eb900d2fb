"""Cassettes: what services answered is given again, exactly, and a replay asks nobody."""

from __future__ import annotations

import asyncio
import itertools
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.errors import ConfigError, InfrastructureError, ServiceError
from mgrpo.services import counters
from mgrpo.services.cassette import Cassette, Mode, canonical
from mgrpo.services.client import HttpService
from mgrpo.services.config import ChatServiceConfig, ServiceConfig
from mgrpo.services.failures import ServiceAnswer, ServiceFailure
from mgrpo.services.openai import ChatService
from tests import fake_clock
from tests.fake_services import Asked, FakeService, Raw
from tests.runs import ROOT

WRITER = """
import asyncio, sys
from mgrpo.services.cassette import Cassette
async def main(path, first):
    tape = Cassette(path, "cached")
    async def call(i):
        return i * i
    for i in range(int(first), int(first) + 60):
        value, _ = await tape.through("squares", {"i": i}, lambda: call(i))
        assert value == i * i
    tape.close()
asyncio.run(main(*sys.argv[1:]))
"""


class Calls:
    """Answers "<n>" to the n-th call, after a moment."""

    def __init__(self, *errors: Exception) -> None:
        self.n, self.errors = 0, list(errors)

    async def __call__(self) -> object:
        self.n += 1
        n = self.n
        await asyncio.sleep(1.0)
        if self.errors:
            raise self.errors.pop(0)
        return {"n": n}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "tape.db"


def through(tape: Cassette, *requests: Any, calls: Calls, **options: Any) -> list[Any]:
    """(value, source) of each request, one after the other."""

    async def main() -> list[Any]:
        found = []
        for request in requests:
            try:
                found.append(await tape.through("search", {"q": request}, calls, **options))
            except Exception as error:
                found.append(error)
        return found

    try:
        return fake_clock.run(main())
    finally:
        tape.close()


def test_modes(path: Path) -> None:
    """Off asks and keeps nothing; record asks once, whatever was recorded before, and keeps the last answer; cached
    asks once; replay never."""
    calls = Calls()
    assert through(Cassette(path, "off"), "a", "a", calls=calls) == [({"n": 1}, "live"), ({"n": 2}, "live")]
    assert not path.exists()
    for n in (3, 4):
        said = through(Cassette(path, "record"), "a", "a", calls=calls)
        assert said == [({"n": n}, "live"), ({"n": n}, "cache")]
    cached = through(Cassette(path, "cached"), "a", "b", "b", calls=calls)
    assert cached == [({"n": 4}, "cache"), ({"n": 5}, "live"), ({"n": 5}, "cache")]
    assert through(Cassette(path, "replay"), "b", "a", calls=calls) == [
        ({"n": 5}, "replay"),
        ({"n": 4}, "replay"),
    ]
    assert calls.n == 5


def test_a_replay_of_what_was_not_recorded_ends_the_run(path: Path) -> None:
    """By service and request, which is cut short; a replay of no file does not even begin."""
    with pytest.raises(ConfigError, match="no such file"):
        Cassette(path, "replay")
    calls = Calls()
    through(Cassette(path, "record"), "a", calls=calls)
    (error,) = through(Cassette(path, "replay"), "b" * 5000, calls=calls)
    assert isinstance(error, ServiceError) and "'search'" in str(error) and '{"q":"bbb' in str(error)
    assert len(str(error)) < 600 and calls.n == 1


def test_answers_of_the_policys_matter_are_recorded_and_failures_are_not(path: Path) -> None:
    """A missing page is missing in the replay too; a service that was down is asked again."""
    calls = Calls(
        ServiceAnswer(404, "no such page"), ServiceFailure("status 503", 503), ServiceError("no key")
    )
    first = through(Cassette(path, "cached"), "a", "b", "c", "b", calls=calls)
    assert [type(found) for found in first[:3]] == [ServiceAnswer, ServiceFailure, ServiceError]
    assert first[3] == ({"n": 4}, "live")
    again = through(Cassette(path, "replay"), "a", "b", "c", calls=calls)
    assert isinstance(again[0], ServiceAnswer) and (again[0].status, again[0].source) == (404, "replay")
    assert again[1] == ({"n": 4}, "replay") and isinstance(again[2], ServiceError) and calls.n == 4


def test_occurrences(path: Path) -> None:
    """A request that is not pure is another one each time: by its name, or else by its number. One that is pure is the
    same, whatever it is called."""
    calls = Calls()
    named = [through(Cassette(path, "cached"), "a", calls=calls, pure=False, occurrence=o)[0] for o in "xyx"]
    assert named == [({"n": 1}, "live"), ({"n": 2}, "live"), ({"n": 1}, "cache")]
    numbered = through(Cassette(path, "cached"), "a", "a", "b", calls=calls, pure=False)
    assert [value["n"] for value, _ in numbered] == [3, 4, 5]
    again = through(Cassette(path, "replay"), "a", "a", "b", calls=calls, pure=False)
    assert [value["n"] for value, _ in again] == [3, 4, 5]
    pure = [through(Cassette(path, "cached"), "p", calls=calls, occurrence=o)[0] for o in "xy"]
    assert pure == [({"n": 6}, "live"), ({"n": 6}, "cache")]


def test_the_same_request_under_way_is_made_once(path: Path) -> None:
    """Eight rollouts ask at once: one call, one answer for all, and each has a value of its own."""
    calls = Calls()

    async def main() -> list[Any]:
        tape = Cassette(path, "record")
        found = await asyncio.gather(*(tape.through("search", {"q": "a"}, calls) for _ in range(8)))
        found[0][0]["n"] = -1  # what one rollout makes of it is not the others'
        tape.close()
        return found

    found = fake_clock.run(main())
    assert calls.n == 1 and [value["n"] for value, _ in found[1:]] == [1] * 7
    assert sorted(source for _, source in found) == ["cache"] * 7 + ["live"]


def test_a_failure_under_way_is_everyones(path: Path) -> None:
    """One call, whose failure each of them gets as an error of its own."""
    calls = Calls(ServiceFailure("status 503", 503, 5, 2))

    async def main() -> list[Any]:
        tape = Cassette(path, "record")
        asked = (tape.through("search", {"q": "a"}, calls) for _ in range(3))
        found = await asyncio.gather(*asked, return_exceptions=True)
        tape.close()
        return found

    found = fake_clock.run(main())
    assert calls.n == 1 and len({id(error) for error in found}) == 3
    assert all(
        isinstance(error, InfrastructureError) and str(error) == "status 503 (5 attempts)" for error in found
    )


def test_everyone_gets_the_answer_that_stays(path: Path) -> None:
    """Two workers ask at once for the same, and a service that is called pure answers each differently: both go on with
    what the recording keeps, a refusal included, so that a replay of both is possible."""
    calls, refused = Calls(), Calls(ServiceAnswer(404, "no such page"))

    async def main() -> list[Any]:
        tapes = [Cassette(path, "cached") for _ in range(2)]
        try:
            both = [tape.through("search", {"q": "a"}, calls) for tape in tapes]
            found = await asyncio.gather(*both)
            mixed = [
                tape.through("search", {"q": "b"}, c) for tape, c in zip(tapes, (refused, calls), strict=True)
            ]
            return [*found, *await asyncio.gather(*mixed, return_exceptions=True)]
        finally:
            for tape in tapes:
                tape.close()

    found = fake_clock.run(main())
    assert found[:2] == [({"n": 1}, "live")] * 2 and calls.n == 3 and refused.n == 1
    assert [(type(e), e.status, e.words) for e in found[2:]] == [(ServiceAnswer, 404, "no such page")] * 2
    (replayed,) = through(Cassette(path, "replay"), "a", calls=calls)
    assert replayed == ({"n": 1}, "replay")


def test_who_waits_goes_on_where_the_caller_was_cancelled(path: Path) -> None:
    """The rollout that made the call ends: the next one makes it, and the others get that answer."""
    calls = Calls()

    async def main() -> list[Any]:
        tape = Cassette(path, "record")
        tasks = [asyncio.create_task(tape.through("search", {"q": "a"}, calls)) for _ in range(3)]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        tape.close()
        return found

    found = fake_clock.run(main())
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [({"n": 2}, "live"), ({"n": 2}, "cache")] and calls.n == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cassette]:
    """One file for all examples; each is another service's."""
    tape = Cassette(tmp_path_factory.mktemp("json") / "tape.db", "cached")
    yield tape
    tape.close()


@settings(max_examples=60, deadline=None)
@given(value=JSON, request=st.dictionaries(st.text(), JSON, max_size=3))
def test_any_json_comes_back(value: Any, request: dict[str, Any], shared: Cassette) -> None:
    """Live, from the cache and from a reordered request: the same value to the last bit, lone surrogates included."""
    service = f"s{next(NUMBERS)}"

    async def main() -> None:
        async def call() -> object:
            return value

        async def never() -> object:
            raise AssertionError("it was recorded")

        live, source = await shared.through(service, request, call)
        back = dict(reversed(list(request.items())))
        cached, again = await shared.through(service, back, never)
        assert (source, again) == ("live", "cache")
        assert repr(live) == repr(cached) == repr(json.loads(json.dumps(value)))

    asyncio.run(main())


def test_what_is_no_json_is_refused(path: Path) -> None:
    """A request that has no canonical form is a mistake of its caller's, before anything is asked."""
    with pytest.raises(ValueError, match="no JSON"):
        canonical({"q": float("nan")})
    (error,) = through(Cassette(path, "record"), object(), calls=Calls())
    assert isinstance(error, ValueError)


def test_several_processes_write_one_file(path: Path) -> None:
    """Three that begin with no file at once, and overlap in what they ask: every answer is there once, and the digest
    is that of a file which one process wrote alone."""
    parts = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)], cwd=ROOT)
        for first in (0, 30, 60)
    ]
    assert [part.wait(60) for part in parts] == [0, 0, 0]
    alone = path.with_name("alone.db")
    subprocess.run([sys.executable, "-c", WRITER, str(alone), "60"], cwd=ROOT, check=True, timeout=60)
    subprocess.run([sys.executable, "-c", WRITER, str(alone), "0"], cwd=ROOT, check=True, timeout=60)
    tapes = [Cassette(path, "replay"), Cassette(alone, "replay")]
    assert [len(tape) for tape in tapes] == [120, 120]
    assert tapes[0].digest() == tapes[1].digest()
    for tape in tapes:
        tape.close()


def test_the_digest_is_of_the_answers(path: Path) -> None:
    """Another answer is another digest."""
    digests = []
    for n in range(3):
        tape = Cassette(path, "record")
        calls = Calls()
        calls.n = n // 2
        through(tape, "a", calls=calls)
        digests.append(tape.digest())
        tape.close()
    assert digests[0] == digests[1] != digests[2]


def test_a_file_of_another_kind_is_left_alone(path: Path) -> None:
    """Neither a text nor another database is written to."""
    path.write_text("not a database, but long enough to look like one" * 40)
    before = path.read_bytes()
    (error,) = through(Cassette(path, "cached"), "a", calls=Calls())
    assert isinstance(error, ConfigError) and path.read_bytes() == before
    other = path.with_name("other.db")
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE mine (x)")
    database.close()
    (error,) = through(Cassette(other, "cached"), "a", calls=Calls())
    assert isinstance(error, ConfigError) and "no cassette" in str(error)
    for mode, words in (("often", "expected one of"), ("record", "folder does not exist")):
        with pytest.raises(ConfigError, match=words):
            Cassette(path.parent / "none" / "tape.db", mode)  # type: ignore[arg-type]


def test_a_recording_of_a_service_replays_without_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and missing pages, with the service gone and its key unset; the file holds neither key nor request; what
    is answered from it is counted."""
    monkeypatch.setenv("SEARCH_KEY", "sk-very-secret")

    def answer(asked: Asked) -> object:
        return Raw(status=404) if asked.json["q"] == "missing" else {"hits": [f"about {asked.json['q']}"]}

    def read(raw: Any) -> list[str]:
        return list(raw["hits"])

    def play(url: str, mode: Mode) -> list[object]:
        async def main() -> list[object]:
            tape = Cassette(path, mode)
            search = HttpService("search", ServiceConfig(url=url, key_env="SEARCH_KEY"), tape)
            found: list[object] = []
            for q in ("rivers", "missing"):
                try:
                    asked = search.request("POST", "/s", read, json={"q": q}, answers={404: "no page"})
                    found.append((await asked).value)
                except ServiceAnswer as error:
                    found.append(str(error))
            await search.close()
            tape.close()
            return found

        return asyncio.run(main())

    with FakeService(answer) as service:
        live = play(service.url, "record")
    monkeypatch.delenv("SEARCH_KEY")
    counters.take()
    assert play("http://127.0.0.1:9", "replay") == live == [["about rivers"], "no page (status 404)"]
    assert counters.take() == {"service/search/calls": 2.0, "service/search/replay": 2.0}
    everything = b"".join(file.read_bytes() for file in path.parent.glob("tape.db*"))
    assert b"sk-very-secret" not in everything and b'"q"' not in everything and b"about rivers" in everything


def test_a_chat_without_schema_replays_as_it_was_asked(path: Path) -> None:
    """A server that takes no schema is found out once; the recording is of the question with it, so a replay, which
    finds out nothing, has all answers."""
    n = 0

    def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal n
        n += 1
        body = json.loads(request.content)
        if "response_format" in body:
            return httpx2.Response(400)
        return httpx2.Response(
            200, json={"choices": [{"message": {"content": f"to {body['messages'][0]['content']}"}}]}
        )

    async def main(mode: Mode) -> list[str]:
        tape = Cassette(path, mode)
        settings = ChatServiceConfig(url="http://judge.test", model="j")
        chat = ChatService("judge", settings, tape, transport=httpx2.MockTransport(answer))
        asked = [[{"role": "user", "content": text}] for text in ("a", "b")]
        found = [(await chat.complete(messages, schema={"type": "object"})).value for messages in asked]
        await chat.close()
        tape.close()
        return found

    assert fake_clock.run(main("record")) == ["to a", "to b"] and n == 3
    assert fake_clock.run(main("replay")) == ["to a", "to b"] and n == 3
