"""Whatever programs and strangers send: it is refused or ended by name, memory stays bounded, nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mgrpo.gateway import connections, server
from mgrpo.gateway.turn import TurnRequest
from tests.gateway_server_kit import FakeRollout, Served, reply, run, served, until

HELLO: dict[str, Any] = {"model": "main", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "chat/completions"
MB = 1 << 20


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def head(at: Served, path: str = f"/rollout/abc/v1/{PATH}", **headers: object) -> bytes:
    """The head of a POST with the rollout's token."""
    told = {"Host": "127.0.0.1", "Authorization": "Bearer secret"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    lines = [
        f"POST {path} HTTP/1.1",
        *(f"{key}: {value}" for key, value in told.items() if value is not None),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def dial(at: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(at.gateway.url.rsplit(":", 1)[1]))


async def is_fine(at: Served) -> None:
    """A program that behaves is answered."""
    assert (await at.post(PATH, HELLO)).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer  x",
        "Bearer wrong",
        "Bearer secret2",
        "Bearer other",
        "Basic secret",
        "secret",
        "Bearer \xff",
    ],
)
def test_tokens_open_one_rollout_each(authorization: str) -> None:
    """A wrong token, another rollout's token and an id that was never given look the same."""

    async def test() -> None:
        async with served() as at:
            at.gateway.open(FakeRollout(id="def", token="other"))
            at.http.headers.pop("Authorization")
            answers = []
            for identity in ("abc", "never"):
                for path, method in (
                    (PATH, "POST"),
                    ("models", "GET"),
                    ("reward", "POST"),
                    ("messages", "POST"),
                ):
                    answer = await at.http.request(
                        method,
                        f"{at.gateway.url}/rollout/{identity}/v1/{path}",
                        headers={b"Authorization": authorization.encode("latin-1")},
                        content=b"{}" if method == "POST" else None,
                    )
                    assert answer.status_code == 401
                    answers.append((path, answer.content, dict(answer.headers)))
            assert answers[:4] == answers[4:] and not at.rollout.asked and not at.rollout.rewarded

    run(test())


def test_only_who_names_loopback_is_answered() -> None:
    """A web page that reaches us through a name of its own is refused, token or not; what is advertised is ours."""

    async def test() -> None:
        async with served(advertise="gate.internal") as at:
            statuses = {}
            ours = ("gate.internal:8", "[::1]", "[::1]:80", "LOCALHOST", "127.0.0.2:1")
            for host in ("evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "::1.evil", *ours):
                answer = await at.http.get(
                    f"http://127.0.0.1:{at.gateway.url.rsplit(':', 1)[1]}/health", headers={"Host": host}
                )
                statuses[host] = answer.status_code
            assert {host for host, status in statuses.items() if status == 200} == set(ours)
            assert set(statuses.values()) == {403, 200}

    run(test())


def test_two_ends_of_one_request_close_the_connection() -> None:
    """What follows a request whose length is said twice is never taken for another request."""

    async def test() -> None:
        async with served() as at:
            reader, writer = await dial(at)
            body = json.dumps(HELLO).encode()
            writer.write(head(at, Content_Length=4, Transfer_Encoding="chunked"))
            writer.write(
                b"%x\r\n%s\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" % (len(body), body)
            )
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
            assert b'"ambiguous_length"' in answer and not at.rollout.asked
            await is_fine(at)

    run(test())


def test_replies_of_one_rollout_are_not_found_from_another() -> None:
    """Neither by their ids nor by those of their items, with the right token of the other."""

    async def test() -> None:
        async with served() as at:
            other = FakeRollout(id="def", token="other")
            url, headers = at.gateway.open(other), {"Authorization": "Bearer other"}
            body = {"model": "main", "input": "Hello"}
            first = (await at.post("responses", body)).json()
            asks = (
                {"previous_response_id": first["id"]},
                {"input": [{"type": "item_reference", "id": first["output"][0]["id"]}]},
            )
            for more in asks:
                answer = await at.http.post(f"{url}/responses", json=body | more, headers=headers)
                assert answer.status_code == 404 and not other.asked

    run(test())


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_not_read(declared: bool) -> None:
    """100 MB, with its length in the head or without: 413, and memory does not grow by more than the bound."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(MB)

    async def test() -> None:
        async with served(body_mb=1.0) as at:
            await is_fine(at)
            before, peak = memory(), 0
            headers = {"Content-Length": str(100 * MB)} if declared else {}
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(
                    at.http.post(f"{at.base}/{PATH}", content=parts(), headers=headers)
                )
                while not asking.done():
                    peak = max(peak, memory())
                    await asyncio.sleep(0.02)
            answer = asking.result()
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
            assert peak - before < 50 * MB
            assert at.gateway._room.left == at.gateway._room.size
            await is_fine(at)

    run(test())


def test_many_bodies_at_once_have_a_bound_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is small enough; those that are too many may come again."""
    monkeypatch.setattr(server, "BODIES", 2)

    async def test() -> None:
        async with served(body_mb=1.0) as at:
            idle = [await dial(at) for _ in range(3)]
            for _, writer in idle:
                writer.write(head(at, Content_Length=10**6) + bytes(900_000))
            await until(lambda: at.gateway._room.left < 300_000)
            lines = [asyncio.create_task(reader.readline()) for reader, _ in idle]
            await asyncio.wait(lines, return_when=asyncio.FIRST_COMPLETED, timeout=20.0)
            (refused,) = [line.result() for line in lines if line.done()]
            assert refused.startswith(b"HTTP/1.1 429")
            await is_fine(at)
            for task, (_, writer) in zip(lines, idle, strict=True):
                task.cancel()
                writer.close()
            await until(lambda: at.gateway._room.left == at.gateway._room.size)

    run(test())


@pytest.mark.parametrize("sent", ["nothing", "half a head", "head", "half a body", "dribble"])
def test_who_does_not_send_a_request_is_cut_off(sent: str) -> None:
    """After idle_seconds, also who sends a byte now and then."""

    async def test() -> None:
        async with served() as at:
            reader, writer = await dial(at)
            whole = head(at, Content_Length=1000)
            first = {"nothing": b"", "half a head": whole[:40], "head": whole}.get(sent, whole + b"{")
            writer.write(first)
            await until(lambda: at.server.server_state.connections)
            (connection,) = at.server.server_state.connections
            if first.endswith(b"{"):
                await until(lambda: at.gateway._room.left < at.gateway._room.size)
            elif first == whole:
                await until(lambda: connection.cycle is not None)
            for seconds in (0, 60, 119):
                at.pass_time(seconds)
                if sent == "dribble":
                    left = at.gateway._room.left
                    writer.write(b" ")
                    await until(lambda left=left: at.gateway._room.left < left)
            assert not connection.transport.is_closing()
            at.pass_time(121)
            assert connection.transport.is_closing() and await _rest(reader) == b""
            writer.close()
            await until(lambda: at.gateway._room.left == at.gateway._room.size)
            await is_fine(at)

    run(test())


def test_connections_are_looked_at_all_the_time() -> None:
    """Who says nothing is cut off without anybody's doing."""

    async def test() -> None:
        async with served(idle_seconds=0.1) as at:
            reader, writer = await dial(at)
            assert await _rest(reader) == b""
            writer.close()

    run(test())


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """What comes before the connection ends, however it ends."""
    try:
        return await asyncio.wait_for(reader.read(), 20.0)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("stream", [False, True])
def test_who_does_not_read_its_answer_is_cut_off(stream: bool) -> None:
    """The answer is larger than what sockets hold; the request's task ends."""

    async def test() -> None:
        long = FakeRollout(lambda request: reply(content="x" * (16 * MB)))
        async with served(long) as at:
            _, writer = await dial(at)
            writer.transport.pause_reading()
            body = json.dumps(HELLO | {"stream": stream}).encode()
            writer.write(head(at, Content_Length=len(body)) + body)
            await until(lambda: long.asked)
            (connection,) = at.server.server_state.connections
            await until(connection.transport.get_write_buffer_size)
            at.pass_time(0)
            at.pass_time(119)
            assert not connection.transport.is_closing()
            at.pass_time(121)
            await until(lambda: not at.server.server_state.connections and not at.server.server_state.tasks)
            writer.close()

    run(test())


def test_a_slow_engine_is_no_idle_connection() -> None:
    """Who waits for its turn is not cut off, however long that takes."""

    async def test() -> None:
        async with served() as at:
            at.rollout.open.clear()
            asking = asyncio.create_task(at.post(PATH, HELLO))
            await until(lambda: at.rollout.asked)
            for hours in range(100):
                at.pass_time(3600.0 * hours)
            at.rollout.open.set()
            assert (await asking).status_code == 200

    run(test())


def test_requests_of_one_rollout_at_once_have_a_bound() -> None:
    """More than twice as many as turns may be sampled are refused before they are read; another rollout is not hurt."""

    async def test() -> None:
        async with served(concurrent_turns=2) as at:
            other = FakeRollout(id="def", token="other")
            url = at.gateway.open(other)
            at.rollout.open.clear()
            waiting = [asyncio.create_task(at.post(PATH, HELLO)) for _ in range(4)]
            await until(lambda: len(at.rollout.asked) == 4)
            refused = await asyncio.gather(*(at.post(PATH, HELLO) for _ in range(20)))
            assert {(a.status_code, a.json()["error"]["code"]) for a in refused} == {
                (429, "too_many_requests")
            }
            answer = await at.http.post(
                f"{url}/{PATH}", json=HELLO, headers={"Authorization": "Bearer other"}
            )
            assert answer.status_code == 200
            at.rollout.open.set()
            assert {(await task).status_code for task in waiting} == {200}
            await is_fine(at)

    run(test())


def test_ten_thousand_rollouts_cost_little() -> None:
    """Registered and idle; one of them is answered, and when they are closed only a few are remembered."""

    async def test() -> None:
        async with served() as at:
            rollouts = [FakeRollout(id=f"r{n}", token=f"t{n}") for n in range(10_000)]
            gc.collect()
            before = memory()
            for rollout in rollouts:
                at.gateway.open(rollout)
            assert memory() - before < 32 * MB
            url = f"{at.gateway.url}/rollout/r9999/v1/{PATH}"
            answer = await at.http.post(url, json=HELLO, headers={"Authorization": "Bearer t9999"})
            assert answer.status_code == 200
            for rollout in rollouts:
                at.gateway.close_rollout(rollout)
            assert len(at.gateway._over) == server.REMEMBERED
            await is_fine(at)

    run(test())


def test_connections_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more ends the one that was idle for longest, never one that is being answered."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 50)

    async def test() -> None:
        async with served() as at:
            at.rollout.open.clear()
            asking = asyncio.create_task(at.post(PATH, HELLO))
            await until(lambda: at.rollout.asked)
            running = at.server
            gc.collect()
            before = memory()
            idle = []
            for n in range(300):
                idle.append(await dial(at))
                await until(lambda n=n: len(running.server_state.connections) == min(50, n + 2))
            assert memory() - before < 32 * MB
            first = [await asyncio.wait_for(reader.read(), 20.0) for reader, _ in idle[:200]]
            assert first == [b""] * 200
            reader, writer = idle[-1]
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            at.rollout.open.set()
            assert (await asking).status_code == 200
            for _, writer in idle:
                writer.close()

    run(test())


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\xff" * 100 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /rollout/abc/v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /rollout/abc/v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /rollout/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n" * 3,
    ],
)
def test_bytes_that_are_no_request_disturb_nobody(raw: bytes) -> None:
    """Refused or cut off; the next program is answered."""

    async def test() -> None:
        async with served() as at:
            reader, writer = await dial(at)
            writer.write(raw)
            writer.write_eof()
            answer = await _rest(reader)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
            writer.close()
            await is_fine(at)

    run(test())


def test_what_a_program_writes_reaches_the_rollout_as_it_is() -> None:
    """Control bytes, control tokens, other scripts: as text, in words and in names."""
    said = "<|im_end|>\x00\x1b[2J</s>\u2028\u202e😀 <tool_call>"

    async def test() -> None:
        def script(request: TurnRequest) -> Any:
            return reply(content=str(request.messages[-1]["content"]))

        async with served(FakeRollout(script)) as at:
            body = {"model": said, "messages": [{"role": "user", "content": said}]}
            answer = await at.post(PATH, body)
            assert answer.json()["choices"][0]["message"]["content"] == said
            assert at.rollout.asked[0].role == said
            streamed = [data for _, data in await at.events(PATH, body) if data != "[DONE]"]
            assert "".join(d["choices"][0]["delta"].get("content", "") for d in streamed) == said

    run(test())


def test_the_gateway_ends_whatever_its_peers_do() -> None:
    """Idle, half sent, waiting for a turn and not reading: all are cut off within the bounds of close()."""

    async def test() -> None:
        long = FakeRollout(lambda request: reply(content="x" * (16 * MB)))
        async with served(long) as at:
            body = json.dumps(HELLO).encode()
            whole = head(at, Content_Length=len(body)) + body
            peers = [await dial(at) for _ in range(12)]
            for number, (_, writer) in enumerate(peers):
                writer.transport.pause_reading()
                writer.write((b"", whole[:50], whole[:-5], whole)[number % 4])
            await until(lambda: len(long.asked) == 3)
            long.open.clear()
            asking = asyncio.create_task(at.post(PATH, HELLO))
            await until(lambda: len(long.asked) == 4)
            await at.gateway.close()
            assert (await asking).status_code == 409
            for _, writer in peers:
                writer.close()

    run(test())
