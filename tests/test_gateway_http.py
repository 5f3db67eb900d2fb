"""The gateway's server: addresses, tokens, refusals, streams that wait, peers that go away, the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import Any

import httpx2
import pytest

from mgrpo.errors import ConfigError
from mgrpo.gateway import exchange
from mgrpo.gateway.body import MAX_DEPTH, parse
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.exchange import Exchange
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.server import Gateway
from tests.gateway_server_kit import FakeRollout, events, reply, run, served, until

HELLO: dict[str, Any] = {"model": "main", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "chat/completions"
INPUTS: dict[str, dict[str, Any]] = {
    PATH: HELLO,
    "responses": {"model": "main", "input": "Hello"},
    "messages": HELLO | {"max_tokens": 9},
}


# -- addresses --


@pytest.mark.parametrize("path", sorted(INPUTS))
def test_the_role_is_the_model_or_in_the_path(path: str) -> None:
    """The path is stronger; a role's name may hold anything; headers name the conversation and tell of a retry."""

    async def test() -> None:
        async with served() as at:
            own = f"{at.gateway.url}/rollout/abc/agent"
            headers = {"x-mgrpo-invocation": "3", "x-stainless-retry-count": "1"}
            assert (await at.post(path, INPUTS[path] | {"model": "sub"})).status_code == 200
            for role in ("sub", "a%20%2Fb", "%2541"):
                answer = await at.http.post(f"{own}/{role}/v1/{path}", json=INPUTS[path], headers=headers)
                assert answer.status_code == 200, answer.text
            asked = [(t.role, t.invocation, t.repeated) for t in at.rollout.asked]
            assert asked == [("sub", None, False), *((role, 3, True) for role in ("sub", "a /b", "%41"))]
            assert (await at.post(path, INPUTS[path], x_mgrpo_invocation="-1")).status_code == 400

    run(test())


def test_models_are_the_roles() -> None:
    """As a list, and one by one."""

    async def test() -> None:
        async with served() as at:
            listed = (await at.http.get(f"{at.base}/models")).json()
            assert [m["id"] for m in listed["data"]] == ["main", "sub"] and listed["object"] == "list"
            assert (await at.http.get(f"{at.base}/models/sub")).json() == listed["data"][1]
            answer = await at.http.get(f"{at.base}/models/other")
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"

    run(test())


def test_rewards_are_posted() -> None:
    """With their conversation, the first where none is named; what is wrong with one is said."""

    async def test() -> None:
        async with served() as at:
            url = f"{at.gateway.url}/rollout/abc/reward"
            told = {"role": "sub", "invocation": 2, "name": "format", "value": 0.5}
            assert (await at.http.post(url, json=told)).json() == told
            await at.http.post(f"{at.base}/reward", json={"role": "main", "name": "format", "value": 1})
            assert at.rollout.rewarded == [("sub", 2, "format", 0.5), ("main", 0, "format", 1.0)]
            for wrong, word in (
                ({"value": "1"}, "value"),
                ({"value": None}, "value"),
                ({"invocation": -1}, "invocation"),
            ):
                answer = await at.http.post(url, json=told | wrong)
                assert answer.status_code == 400 and word in answer.json()["error"]["message"]
            assert (await at.http.post(url, json=told | {"role": "x"})).status_code == 404

    run(test())


def test_health_and_wrong_addresses() -> None:
    """Health needs no token; an unknown path is 404, a wrong method 405, both as JSON."""

    async def test() -> None:
        async with served() as at:
            async with httpx2.AsyncClient(timeout=30.0, verify=False) as stranger:
                assert (await stranger.get(f"{at.gateway.url}/health")).json() == {"status": "ok"}
            assert (await at.http.get(f"{at.gateway.url}/docs")).json()["error"]["code"] == "not_found"
            assert (await at.post("embeddings", {})).status_code == 404
            assert (await at.http.get(f"{at.base}/{PATH}")).status_code == 405
            assert (await at.http.post(f"{at.gateway.url}/health")).status_code == 405

    run(test())


def test_an_address_that_is_taken_is_named() -> None:
    """Before anything is served; an address that does not exist, too."""

    async def test() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"host '127.0.0.1', port {port}"):
                await Gateway(GatewayOptions(port=port)).start()
        with pytest.raises(ConfigError, match=r"host '192\.0\.2\.1', port 0"):
            await Gateway(GatewayOptions(host="192.0.2.1")).start()

    run(test())


def test_what_serves_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, when the gateway is made."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r'pip install "mgrpo\[gateway\]"'):
        Gateway(GatewayOptions())


@pytest.mark.parametrize(
    ("options", "url"),
    [({"host": "0.0.0.0"}, "http://127.0.0.1:"), ({"host": "0.0.0.0", "advertise": "box"}, "http://box:")],
)
def test_the_address_is_one_that_programs_reach(options: dict[str, Any], url: str) -> None:
    """Not that of all interfaces."""

    async def test() -> None:
        async with served(**options) as at:
            assert at.gateway.url.startswith(url) and at.base.startswith(f"{at.gateway.url}/rollout/abc/v1")

    run(test())


def test_a_rollout_is_opened_once() -> None:
    """And answered until it is closed; afterwards its programs are told that it is over, which no SDK asks twice."""

    async def test() -> None:
        async with served() as at:
            with pytest.raises(ValueError, match="abc is open already"):
                at.gateway.open(at.rollout)
            at.gateway.close_rollout(at.rollout)
            at.gateway.close_rollout(at.rollout)
            answer = await at.post(PATH, HELLO)
            assert answer.status_code == 409 and answer.json()["error"]["code"] == "rollout_over"
            assert answer.headers["x-should-retry"] == "false" and not at.rollout.asked
            assert (await at.post(PATH, HELLO, Authorization="Bearer wrong")).status_code == 401

    run(test())


def test_others_may_serve_beside_the_rollouts() -> None:
    """What they answer, they answer alone, refusals included; everything else goes on as without them."""

    async def extra(exchange: Exchange) -> bool:
        if exchange.path != "/harness/claim":
            return False
        if exchange.method != "POST":
            raise GatewayError(405, "method_not_allowed", "words")
        await exchange.answer(200, {"claimed": 1})
        return True

    async def test() -> None:
        async with served(extra=extra) as at:
            assert (await at.http.post(f"{at.gateway.url}/harness/claim")).json() == {"claimed": 1}
            assert (await at.http.get(f"{at.gateway.url}/harness/claim")).status_code == 405
            assert (await at.http.get(f"{at.gateway.url}/harness")).status_code == 404
            assert (await at.post(PATH, HELLO)).status_code == 200

    run(test())


# -- refusals --


@pytest.mark.parametrize(
    ("status", "code", "kind", "retried"),
    [
        (400, "context_length_exceeded", "invalid_request_error", None),
        (404, "model_not_found", "not_found_error", None),
        (409, "history_rewritten", "invalid_request_error", "false"),
        (409, "conversation_busy", "invalid_request_error", None),
        (429, "too_many_concurrent_turns", "rate_limit_error", None),
        (503, "engine_unavailable", "server_error", None),
    ],
)
def test_refusals_of_a_turn_keep_their_status(status: int, code: str, kind: str, retried: str | None) -> None:
    """Plain and streamed, in the API's form; an SDK is told where asking again is of no use."""

    def script(request: Any) -> Any:
        raise GatewayError(status, code, "words")

    async def test() -> None:
        async with served(FakeRollout(script)) as at:
            for stream in (False, True):
                answer = await at.post(PATH, HELLO | {"stream": stream})
                assert answer.status_code == status and answer.headers.get("x-should-retry") == retried
                told = {"message": "words", "type": kind, "param": None, "code": code}
                assert answer.json() == {"error": told}

    run(test())


def test_a_mistake_of_ours_is_logged_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """The program learns its kind, the worker's log where it is."""

    def script(request: Any) -> Any:
        raise KeyError("inner words")

    async def test() -> None:
        async with served(FakeRollout(script)) as at:
            answer = await at.post(PATH, HELLO)
            assert answer.status_code == 500 and "KeyError" in answer.text and "inner" not in answer.text
            assert (await at.http.get(f"{at.base}/models")).status_code == 200
        assert any(r.name == "mgrpo.gateway" and r.exc_info for r in caplog.records)

    run(test())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"[1]", "no object"),
        (b'{"a": NaN}', "is no JSON"),
        (b'{"a": "\\ud800"}', "is no JSON"),
        (b'{"a": "\xff"}', "is no JSON"),
        (b'{"a": "\x00"}', "is no JSON"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "levels"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "levels"),
        (b'{"a":[' + b"[]," * 600_000 + b"[]]}", "opening brackets"),
        (b'{"a":[' + b"1," * 2_100_000 + b"1]}", "commas"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, words: str) -> None:
    """400: cut off, no UTF-8, half of a character, nested or filled like a bomb."""
    with pytest.raises(GatewayError, match=words) as refused:
        parse(body)
    assert refused.value.status == 400


def test_json_within_the_bounds_is_taken() -> None:
    """Nested up to the bound."""
    parse(b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}")


# -- time --


@pytest.mark.parametrize("path", sorted(INPUTS))
def test_a_stream_says_that_it_lives(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments while the turn is sampled, then the same events as without; what goes wrong then is an event."""
    monkeypatch.setattr(exchange, "KEEP_ALIVE_SECONDS", 0.01)

    async def test() -> None:
        async with served() as at:
            whole = await at.events(path, INPUTS[path])
            for fails in (False, True):
                at.rollout.open.clear()
                if fails:
                    at.rollout.script = _fails
                body = INPUTS[path] | {"stream": True}
                async with at.http.stream("POST", f"{at.base}/{path}", json=body) as answer:
                    assert answer.status_code == 200
                    raw = answer.aiter_raw()
                    begun = await anext(raw)
                    assert begun.startswith(b": keep-alive\n\n")
                    at.rollout.open.set()
                    rest = begun + b"".join([part async for part in raw])
                found = events(rest)
                if not fails:
                    assert found == whole
                    continue
                ((name, data),) = found
                assert name == (None if path == PATH else "error")
                assert data["error"]["code"] == "engine_unavailable" and data["error"]["message"] == "words"

    run(test())


def _fails(request: Any) -> Any:
    raise GatewayError(503, "engine_unavailable", "words")


@pytest.mark.parametrize("stream", [False, True])
def test_a_peer_that_goes_away_takes_its_question_back(stream: bool) -> None:
    """The rollout sees its call cancelled, and the next request is answered."""

    async def test() -> None:
        async with served() as at:
            at.rollout.open.clear()
            asking = asyncio.create_task(at.post(PATH, HELLO | {"stream": stream}))
            await until(lambda: at.rollout.asked)
            asking.cancel()
            await until(lambda: at.rollout.cancelled == 1)
            at.rollout.open.set()
            again = await at.post(PATH, HELLO, x_stainless_retry_count="1")
            assert again.status_code == 200 and at.rollout.asked[1].repeated

    run(test())


def test_a_connection_is_used_again() -> None:
    """Turn after turn, streamed and plain, of several rollouts."""

    async def test() -> None:
        async with served() as at:
            other = FakeRollout(lambda request: reply(content="other"), id="def", token="other")
            url = at.gateway.open(other)
            for _ in range(3):
                await at.events(PATH, HELLO)
                answer = await at.http.post(
                    f"{url}/{PATH}", json=HELLO, headers={"Authorization": "Bearer other"}
                )
                assert answer.json()["choices"][0]["message"]["content"] == "other"
            assert len(at.server.server_state.connections) == 1

    run(test())


def test_requests_that_follow_at_once_are_answered_in_turn() -> None:
    """Several of them in one packet, a turn among them; a connection that is being answered is none of the idle."""

    async def test() -> None:
        async with served() as at:
            at.rollout.open.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", int(at.gateway.url.rsplit(":", 1)[1]))
            health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
            body = json.dumps(HELLO).encode()
            asks = (
                f"POST /rollout/abc/v1/{PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            )
            turn = f"{asks}Content-Length: {len(body)}\r\n\r\n".encode() + body
            writer.write(health + turn + health)
            await until(lambda: at.rollout.asked)
            assert not at.server.server_state.idle
            at.rollout.open.set()
            found = b""
            while found.count(b"HTTP/1.1 200") < 3 or found.count(b'"status":"ok"') < 2:
                found += await asyncio.wait_for(reader.read(1 << 16), 20.0)
            assert found.index(b"chat.completion") < found.rindex(b'"status":"ok"')
            await until(lambda: at.server.server_state.idle)
            writer.close()

    run(test())


def test_the_gateway_ends_while_turns_are_sampled() -> None:
    """Whoever waits for a turn is told that the rollout is over, or is cut off; closing twice does nothing more."""

    async def test() -> None:
        async with served() as at:
            at.rollout.open.clear()
            asking = asyncio.create_task(at.post(PATH, HELLO))
            await until(lambda: at.rollout.asked)
            await at.gateway.close()
            answer = await asking
            assert answer.status_code == 409 and answer.json()["error"]["code"] == "rollout_over"
            assert at.rollout.cancelled == 1
            with pytest.raises(httpx2.ConnectError):
                await at.post(PATH, HELLO)

    run(test())


def test_a_gateway_that_was_not_started_closes() -> None:
    """Nothing was opened."""
    run(Gateway(GatewayOptions()).close())


def test_pages_of_other_hosts_are_not_answered() -> None:
    """A page can send a request that it needs no leave for, and would take a rollout away from its program; the
    browser names the page's host. Pages of this machine, and programs, which name none, are answered."""

    async def test() -> None:
        async def claimed(exchange: Exchange) -> bool:
            await exchange.answer(200, {})
            return True

        async with served(extra=claimed) as at:
            statuses = {}
            ours = ("http://localhost:3000", "http://127.0.0.1:8", "http://[::1]:5", "https://localhost")
            others = (
                "https://evil.example",
                "null",
                "http://[",
                "http://127.0.0.1.evil.example:80",
                "",
                "file://",
            )
            for origin in (*ours, *others):
                answer = await at.http.post(
                    f"{at.gateway.url}/harness/claim", content="{}", headers={"Origin": origin}
                )
                statuses[origin] = answer.status_code
            assert statuses == dict.fromkeys(ours, 200) | dict.fromkeys(others, 403)

    run(test())


def test_a_connection_that_is_accepted_while_the_server_closes_is_closed() -> None:
    """It is none of the server's connections yet; its peer sees its end, whichever turn of the loop it comes in."""

    async def test() -> None:
        for turns in range(8):
            gateway = Gateway(GatewayOptions())
            await gateway.start()
            with socket.create_connection(("127.0.0.1", int(gateway.url.rsplit(":", 1)[1])), 20) as peer:
                for _ in range(turns):
                    await asyncio.sleep(0)
                await gateway.close()
                peer.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert peer.recv(1) == b""

    run(test())
