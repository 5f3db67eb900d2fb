"""Services over HTTP: what an answer is, what is tried again, what ends the run, and what is said of it."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from mgrpo.errors import InfrastructureError, ServiceError
from mgrpo.services import counters
from mgrpo.services.answers import as_text, seconds_of
from mgrpo.services.client import HttpService
from mgrpo.services.config import ChatServiceConfig, ServiceConfig
from mgrpo.services.failures import ServiceAnswer, ServiceFailure
from mgrpo.services.openai import ChatService
from tests import fake_clock
from tests.fake_services import FakeService, Raw

KEY = "sk-very-secret"
HITS = {"hits": ["a", "b"]}


def read(raw: Any) -> list[str]:
    """Of a search that answers {"hits": [...]}."""
    if not isinstance(raw, dict) or not isinstance(raw.get("hits"), list):
        raise ValueError("expected hits")
    return [str(hit) for hit in raw["hits"]]


def config(url: str = "http://search.test", **settings: Any) -> ServiceConfig:
    return ServiceConfig.model_validate({"url": url, "backoff": 0.01, "timeout": 5.0, **settings})


def mock(answer: Callable[[httpx2.Request], httpx2.Response]) -> httpx2.MockTransport:
    return httpx2.MockTransport(answer)


async def closed(service: HttpService | ChatService, work: Callable[[], Awaitable[Any]]) -> Any:
    try:
        return await work()
    finally:
        await service.close()


def ask(
    url: str, *, settings: dict[str, Any] | None = None, name: str = "search", **options: Any
) -> tuple[Any, dict[str, float]]:
    """The value or error of one request over a real socket, and what was counted of it."""

    async def main() -> Any:
        service = HttpService(name, config(url, **(settings or {})))
        try:
            return await closed(
                service, lambda: service.request("POST", "/search", read, json={"q": "x"}, **options)
            )
        except Exception as error:
            return error

    counters.take()
    found = asyncio.run(main())
    return found, {key.rpartition("/")[2]: value for key, value in counters.take().items()}


@pytest.mark.parametrize(
    "fault", ["429", "429-date", "408", "500", "503", "504", "slow", "cut", "drop", "reset", "shape", "html", "empty"]
)  # fmt: skip
def test_infrastructure_is_tried_again(fault: str) -> None:
    """On a real socket: the third attempt is the one that is answered, and two retries are counted."""
    with FakeService(HITS) as service:
        service.faults += [fault] * 2
        reply, counted = ask(service.url, settings={"timeout": 0.15 if fault == "slow" else 5.0})
    assert reply.value == ["a", "b"] and reply.source == "live"
    assert len(service.requests) == 3
    counted.pop("seconds")
    assert counted == {"calls": 1.0, "live": 1.0, "retries": 2.0}


@pytest.mark.parametrize("fault", ["503", "cut", "shape", "html", "empty"])
def test_what_stays_is_an_infrastructure_failure(fault: str) -> None:
    """One request that always fails, while the service answers others: its own attempts are used up, the failure says
    so, and nothing of it is an answer."""
    with FakeService(HITS) as service:
        service.fault_of = lambda asked: fault if asked.json["q"] == "poison" else None

        async def main() -> ServiceFailure:
            search = HttpService("search", config(service.url, attempts=3))
            await search.request("POST", "/search", read, json={"q": "x"})
            with pytest.raises(InfrastructureError) as caught:
                await closed(search, lambda: search.request("POST", "/search", read, json={"q": "poison"}))
            assert isinstance(caught.value, ServiceFailure)
            return caught.value

        failure = asyncio.run(main())
    poisoned = [asked for asked in service.requests if asked.json["q"] == "poison"]
    assert failure.attempts == len(poisoned) and failure.others >= 1
    assert failure.status == (503 if fault == "503" else 200)
    assert f"({len(poisoned)} attempts)" in str(failure)


@pytest.mark.parametrize(
    ("fault", "words"), [("401", "refuses the key"), ("402", "paid"), ("403", "forbids")]
)
def test_a_refused_key_ends_the_run(fault: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; the error names service, address and variable, and never the key, which the service's words repeat."""
    monkeypatch.setenv("SEARCH_KEY", KEY)
    with FakeService(lambda asked: Raw(f'{{"error": "bad key {KEY}"}}', int(fault))) as service:
        error, _ = ask(service.url, settings={"key_env": "SEARCH_KEY"})
    assert isinstance(error, ServiceError) and len(service.requests) == 1
    assert words in str(error) and "'search'" in str(error) and service.url in str(error)
    assert "$SEARCH_KEY" in str(error) and KEY not in str(error)


def test_a_key_is_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the header that the service wants, read when the request is made; not in the failure that quotes the service
    and not in a log."""
    caplog.set_level(logging.DEBUG)
    with FakeService(lambda asked: Raw(f'{{"error": "what is {KEY}?"}}', 400)) as service:

        async def main(key_header: str) -> str:
            search = HttpService("search", config(service.url, key_env="SEARCH_KEY"), key_header=key_header)
            monkeypatch.setenv("SEARCH_KEY", KEY)  # after the service was made
            with pytest.raises(ServiceFailure) as caught:
                await closed(search, lambda: search.request("GET", "/", read))
            return str(caught.value)

        words = [asyncio.run(main("Authorization")), asyncio.run(main("X-API-KEY"))]
    first, second = service.requests
    assert first.headers["authorization"] == f"Bearer {KEY}" and second.headers["x-api-key"] == KEY
    assert "authorization" not in second.headers
    assert all("what is ***?" in text for text in words) and KEY not in caplog.text


@pytest.mark.parametrize(
    ("value", "words"), [(None, "is not set"), ("", "is not set"), ("a\nb", "holds no key")]
)
def test_a_missing_key_is_named(value: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable, before anything is sent."""
    monkeypatch.delenv("SEARCH_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SEARCH_KEY", value)
    with FakeService(HITS) as service:
        error, _ = ask(service.url, settings={"key_env": "SEARCH_KEY"})
    assert isinstance(error, ServiceError) and "SEARCH_KEY" in str(error) and words in str(error)
    assert not service.requests


def test_statuses_of_the_caller() -> None:
    """`answers` are the policy's matter and `fatal` the run's, whatever they would mean otherwise."""
    with FakeService(HITS) as service:
        service.down = "404"
        answer, _ = ask(service.url, answers={404: "there is no such page"})
        service.down = "403"
        error, _ = ask(service.url, fatal={403: "JSON is off in its settings"})
        service.down = "503"
        busy, _ = ask(service.url, answers={503: "the page cannot be loaded"})
    assert isinstance(answer, ServiceAnswer) and (answer.status, answer.words) == (
        404,
        "there is no such page",
    )
    assert isinstance(error, ServiceError) and "JSON is off in its settings (status 403)" in str(error)
    assert isinstance(busy, ServiceAnswer) and len(service.requests) == 3


def test_a_wrong_address_is_fatal_until_something_was_answered() -> None:
    """404 of the first request is a mistake in the config; later it may be a policy's, and fails one request alone."""
    with FakeService(HITS) as service:
        service.down = "404"
        error, _ = ask(service.url)

        async def later() -> None:
            service.down = None
            search = HttpService("search", config(service.url))
            await search.request("POST", "/search", read, json={})
            service.down = "404"
            with pytest.raises(ServiceFailure, match="status 404"):
                await closed(search, lambda: search.request("POST", "/search", read, json={}))

        asyncio.run(later())
    assert isinstance(error, ServiceError) and "is the address right?" in str(error)


@pytest.mark.parametrize(("status", "words"), [("400", "status 400: FAULT 400"), ("422", "status 422")])
def test_a_request_that_is_wrong_is_not_tried_again(status: str, words: str) -> None:
    """It would fail again; the service's own words are in the failure, and the breaker stays closed."""
    with FakeService(HITS) as service:
        service.down = status
        error, counted = ask(service.url, settings={"attempts": 1})
    assert isinstance(error, ServiceFailure) and words in str(error) and len(service.requests) == 1
    assert counted["failures"] == 1.0 and "outages" not in counted


def test_retry_after_is_kept() -> None:
    """In seconds and as a date, on a clock of the test's: no attempt is made earlier, none much later."""
    times: list[float] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        times.append(fake_clock.now())
        return (
            httpx2.Response(429, headers={"Retry-After": "7"})
            if len(times) < 3
            else httpx2.Response(200, json=HITS)
        )

    async def main() -> None:
        search = HttpService("search", config(backoff=0.5), transport=mock(answer))
        await closed(search, lambda: search.request("GET", "/", read))

    fake_clock.run(main())
    assert times == pytest.approx([0.0, 7.0, 14.0])
    date = email.utils.formatdate(1_000_060.0, usegmt=True)
    assert seconds_of(date, now=1_000_000.0) == 60.0 and seconds_of(date, now=1_000_100.0) == 0.0
    assert seconds_of("3") == 3.0 and seconds_of("1.5") == 1.5
    assert [seconds_of(text) for text in (None, "", "soon", "-3", "nan", "inf")] == [None] * 6


def test_pauses_double_within_half_and_once_and_a_half() -> None:
    """Of ten attempts, the ninth pause would be 128 s: none is longer than 30 s."""
    times: list[float] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        times.append(fake_clock.now())
        return httpx2.Response(500) if len(times) < 10 else httpx2.Response(200, json=HITS)

    async def main() -> None:
        search = HttpService("search", config(backoff=0.5, attempts=10), transport=mock(answer))
        await closed(search, lambda: search.request("GET", "/", read))

    fake_clock.run(main())
    for number, (before, after) in enumerate(itertools.pairwise(times)):
        whole = 0.5 * 2**number
        assert min(0.5 * whole, 30.0) - 1e-6 <= after - before <= min(1.5 * whole, 30.0) + 1e-6


def test_concurrency_is_of_the_service() -> None:
    """Twelve requests at once over three places: never more than three are under way, and all are answered."""
    open_, most = 0, 0

    async def answer(request: httpx2.Request) -> httpx2.Response:
        nonlocal open_, most
        open_ += 1
        most = max(most, open_)
        await asyncio.sleep(1.0)
        open_ -= 1
        return httpx2.Response(200, json=HITS)

    async def main() -> float:
        search = HttpService("search", config(concurrency=3), transport=httpx2.MockTransport(answer))

        async def all_() -> None:
            await asyncio.gather(*(search.request("GET", f"/{i}", read) for i in range(12)))

        await closed(search, all_)
        return fake_clock.now()

    assert fake_clock.run(main()) == pytest.approx(4.0) and most == 3


def test_what_is_sent() -> None:
    """Method, path below the address's own, parameters, JSON and headers arrive; text comes in its charset."""
    with FakeService(
        lambda asked: Raw("Größe".encode("latin-1"), kind="text/plain; charset=latin-1")
    ) as service:

        async def main() -> Any:
            reader = HttpService("reader", config(f"{service.url}/api/", headers={"X-Own": "1"}))
            return await closed(
                reader,
                lambda: reader.request(
                    "POST",
                    "/read",
                    str,
                    json={"a": [1]},
                    params={"q": "b c&d"},
                    headers={"X-More": "2"},
                    as_text=True,
                ),
            )

        assert asyncio.run(main()).value == "Größe"
    (asked,) = service.requests
    assert (asked.method, asked.path, asked.query, asked.json) == (
        "POST",
        "/api/read",
        {"q": "b c&d"},
        {"a": [1]},
    )
    assert asked.headers["x-own"] == "1" and asked.headers["x-more"] == "2"
    assert as_text(b"\xff", "text/plain; charset=none-such") == "�"


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails alone, and is not tried again."""
    monkeypatch.setattr("mgrpo.services.client.MAX_BYTES", 1 << 20)
    with FakeService(lambda asked: Raw(b" " * (3 << 20))) as service:
        error, _ = ask(service.url)
    assert isinstance(error, ServiceFailure) and "more than 1 MiB" in str(error)
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "ftp://x"}, "expected http"),
        ({"url": "http://"}, "expected http"),
        ({"url": "http://x/?key=1"}, "expected http"),
        ({"url": "http://me:pass@x"}, "use key_env"),
        ({"key_env": "sk-1234567"}, "not a key"),
        ({"headers": {"Authorization": "Bearer x"}}, "use key_env"),
        ({"attempts": 0}, "greater than or equal to 1"),
        ({"timeout": 0.0}, "greater than 0"),
        ({"retries": 3}, "Extra inputs"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(settings: dict[str, Any], words: str) -> None:
    """By name; a key in the wrong place is not repeated in the error."""
    with pytest.raises(ValidationError, match=words) as caught:
        config(**settings)
    assert all("1234567" not in error["msg"] for error in caught.value.errors())


# -- chat models -------------------------------------------------------------------------------------------------------


def completion(text: object, **message: object) -> dict[str, object]:
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def judge(url: str, **settings: Any) -> ChatService:
    chosen = {"url": url, "model": "j", "backoff": 0.01, "timeout": 5.0, **settings}
    return ChatService("judge", ChatServiceConfig.model_validate(chosen))


SCHEMA = {"type": "object", "properties": {"verdict": {"type": "string"}}}
ASKED = [{"role": "user", "content": "is it?"}]


def test_a_chat_is_asked_as_the_api_wants_it() -> None:
    """Address, body and schema; tokens are counted as the server counts them."""
    with FakeService(completion("yes")) as service:

        async def main() -> str:
            chat = judge(service.url, extra={"top_p": 0.5})
            reply = await closed(chat, lambda: chat.complete(ASKED, schema=SCHEMA))
            return str(reply.value)

        counters.take()
        assert asyncio.run(main()) == "yes"
        counted = counters.take()
    (asked,) = service.requests
    assert asked.path == "/v1/chat/completions"
    body = asked.json
    schema = body.pop("response_format")
    assert schema["type"] == "json_schema" and schema["json_schema"]["schema"] == SCHEMA
    assert body == {"model": "j", "messages": ASKED, "temperature": 0.0, "max_tokens": 512, "top_p": 0.5}
    assert counted["service/judge/tokens_in"] == 7.0 and counted["service/judge/tokens_out"] == 3.0


def test_a_server_that_takes_no_schema_is_asked_without() -> None:
    """Once it has refused one, from then on at once; a request that is refused without one too fails, and says
    nothing of schemas."""

    def answer(asked: Any) -> object:
        if "response_format" in asked.json or asked.json["messages"][0]["content"] == "too long":
            return Raw('{"error": {"message": "not so"}}', 400)
        return completion("yes")

    with FakeService(answer) as service:

        async def main() -> None:
            chat = judge(f"{service.url}/v1")
            with pytest.raises(ServiceFailure, match="not so"):
                await chat.complete([{"role": "user", "content": "too long"}], schema=SCHEMA)
            for _ in range(2):
                assert (await chat.complete(ASKED, schema=SCHEMA)).value == "yes"
            await chat.close()

        asyncio.run(main())
    assert ["response_format" in asked.json for asked in service.requests] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert {asked.path for asked in service.requests} == {"/v1/chat/completions"}


@pytest.mark.parametrize("body", [completion(None), completion(""), completion(None, refusal="I won't")])
def test_an_answer_without_text_is_a_failure(body: dict[str, object]) -> None:
    """A refusal is nobody's verdict."""
    with FakeService(body) as service:

        async def main() -> None:
            chat = judge(service.url)
            with pytest.raises(ServiceFailure, match="without text"):
                await closed(chat, lambda: chat.complete(ASKED))

        asyncio.run(main())


def test_an_unknown_model_ends_the_run() -> None:
    """404 of this route names the model."""
    with FakeService() as service:
        service.down = "404"

        async def main() -> None:
            chat = judge(service.url)
            with pytest.raises(ServiceError, match="model 'j' is unknown"):
                await closed(chat, lambda: chat.complete(ASKED))

        asyncio.run(main())


def test_counters_are_taken_by_difference() -> None:
    """Each take() gives what came since the one before, and services of one name count together."""
    counters.take()
    first, second = (HttpService("counted", config(), transport=mock(lambda r: httpx2.Response(200, json=HITS)))
                     for _ in range(2))  # fmt: skip

    async def main(n: int) -> None:
        for _ in range(n):
            await first.request("GET", "/", read)
            await second.request("GET", "/", read)

    fake_clock.run(main(2))
    taken = counters.take()
    assert taken["service/counted/calls"] == taken["service/counted/live"] == 4.0
    fake_clock.run(main(1))
    assert counters.take()["service/counted/calls"] == 2.0 and counters.take() == {}
    assert first.metrics()["service/counted/calls"] == 6.0
    assert json.dumps(first.metrics())
