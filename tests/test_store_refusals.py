"""What a store is told and must not take: a named refusal each, counted, and nothing stored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import mgrpo
from mgrpo.store import records as rec
from mgrpo.store.server import StoreServer
from mgrpo.transport import codec
from mgrpo.transport.codec import Item, Limits, Sender
from tests.ledger_machine import invocation
from tests.store_kit import DIGEST, fill, publish, rss_mb, run_params

NAN, INF = float("nan"), float("inf")
WORKER = Sender(DIGEST, "worker", "w", "s")
TRAINER = Sender(DIGEST, "trainer:main", "t", "s")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StoreServer]:
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(max_lag=100)) as server:
        for role in ("main", "sub"):
            publish(server.url, role).close()
        with mgrpo.connect(server.url, role="worker", run=DIGEST) as worker:
            worker.open_group(query="a", k=2, d_max={}, index=0)
        yield server


class Wild:
    """A peer that sends whatever bytes it likes."""

    def __init__(self, url: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(url)

    def ask(self, *frames: bytes) -> tuple[str, str] | None:
        """(status, message) of the answer; None when there is none within 2 s."""
        self._socket.send_multipart(frames)
        if not self._socket.poll(2000):
            return None
        header, *rest = self._socket.recv_multipart()
        (item, *_) = codec.decode_batch(header, len(rest), Limits()).items
        body, _ = codec.body_of(item, rest)
        return item.name, str(msgspec.msgpack.decode(body))

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def close(self) -> None:
        self._socket.close()


def message(method: str, body: object, sender: Sender = WORKER) -> bytes:
    return codec.encode_batch(sender, [Item(1, method, msgspec.Raw(codec.encode(body)))])


def rows(store: StoreServer) -> list[Any]:
    """Everything in the store's file."""
    tables = [
        name for (name,) in store._database._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    return [store._database._db.execute(f"SELECT * FROM {table}").fetchall() for table in sorted(tables)]


def final(reward: float, **changes: Any) -> rec.RolloutFinal:
    return msgspec.structs.replace(rec.RolloutFinal("a", 0, 0, reward, 1.0, {"sub": 0}, {}, 0, 0), **changes)


BAD: dict[str, tuple[bytes, str, str]] = {
    "no MessagePack": (b"\xff\xfe\xfd", "BAD_REQUEST", "header"),
    "another protocol": (codec.encode([9, ["", "", "", ""], []]), "BAD_REQUEST", "protocol 9"),
    "a header beyond the limit": (b"\x93" + bytes(70_000), "BAD_REQUEST", "the limit is 65536"),
    "a string beyond the limit": (codec.encode([1, ["x" * 300, "", "", ""], []]), "BAD_REQUEST", "256"),
    "an unknown method": (message("format_disk", None), "BAD_REQUEST", "format_disk"),
    "a body of another kind": (message("rollout_final", {"reward": 1}), "BAD_REQUEST", "RolloutFinal"),
    "a reward that is no number": (message("rollout_final", final(NAN)), "BAD_REQUEST", "nan"),
    "an endless score": (message("rollout_final", final(1.0, scores={"x": INF})), "BAD_REQUEST", "inf"),
    "a rollout beyond K": (message("rollout_final", final(1.0, rollout=2)), "BAD_REQUEST", "rollout 2"),
    "versions upside down": (
        message("invocation_done", rec.InvocationDone("a", 0, 0, "main", 0, 1, 5, 4, {}, None)),
        "BAD_REQUEST",
        "versions 5..4",
    ),
    "a worker that claims": (message("claim", rec.Claim("main", 1, 1, 1, 0.0)), "FORBIDDEN", "worker"),
    "a trainer of another role": (
        message("claim", rec.Claim("sub", 1, 1, 1, 0.0), TRAINER), "FORBIDDEN", "trainer:main",
    ),
    "a trainer that writes rollouts": (message("rollout_final", final(1.0), TRAINER), "FORBIDDEN", "trainer:main"),
    "another run": (
        message("rollout_final", final(1.0), Sender("other", "worker", "w", "s")), "WRONG_RUN", "'other'",
    ),
    "an old epoch": (message("claim", rec.Claim("main", 0, 1, 1, 0.0), TRAINER), "FENCED", "epoch"),
    "an unknown group": (message("rollout_final", final(1.0, query="b")), "NOT_FOUND", "'b'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_has_a_name_is_counted_and_stores_nothing(store: StoreServer, name: str) -> None:
    """Over the link, as any stranger could send it."""
    sent, code, words = BAD[name]
    before, counted = rows(store), store.counters().get(code, 0)
    wild = Wild(store.url)
    try:
        answer = wild.ask(sent)
    finally:
        wild.close()
    assert answer is not None and answer[0] == code and words in answer[1], answer
    assert store.counters()[code] == counted + 1
    assert rows(store) == before


def test_a_frame_beyond_the_limit_is_never_taken(store: StoreServer) -> None:
    """libzmq itself cuts the connection; others are served on."""
    before = rows(store)
    wild = Wild(store.url)
    try:
        assert wild.ask(message("rollout_final", final(1.0)), bytes(17 << 20)) is None
    finally:
        wild.close()
    with mgrpo.connect(store.url, role="observer", run=DIGEST) as observer:
        assert observer.stats()["open"] == 1
    assert rows(store) == before


def test_mutated_requests_break_nothing(store: StoreServer, tmp_path: Path) -> None:
    """3,000 damaged requests of every kind and role: no handler fails, memory stays, work goes on, and the file is
    whole."""
    assert storm(store, 3000, seed=1) < 20
    assert store.failure is None and store.counters().get("INTERNAL", 0) == 0
    assert store.counters()["BAD_REQUEST"] > 1000
    with publish(store.url, "main"), publish(store.url, "sub"):
        with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
            sealed = worker.stats()["sealed"]
            fill(worker, "after", index=150)
            worker.flush()
            assert worker.stats()["sealed"] == sealed + 1
    store.close()
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db") as again:
        assert again._database._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def storm(store: StoreServer, n: int, seed: int) -> float:
    """Send n damaged requests, 50 a connection; returns how many MiB the process has grown."""
    rng = random.Random(seed)
    requests = [
        message("open_group", rec.OpenGroup("b", 2, {"sub": 4}, 1)),
        message("invocation_done", invocation("a", 0, 0, "main", 0)),
        message("rollout_final", final(1.0)),
        message("rollout_fail", rec.RolloutFail("a", 1, 0, "down")),
        message("open_groups", rec.OpenGroups("", 0, 9)),
        message("report", rec.Report(1, "step", {"loss": 0.5})),
        message("claim", rec.Claim("main", 1, 1, 1, 0.0), TRAINER),
        message("apply", rec.Groups("main", 1, [("a", 1)], 0), TRAINER),
        message("commit", rec.Commit("main", 1, 0), TRAINER),
        message("status", rec.Status("main", 1, 0, 0, 0), TRAINER),
        message("wait", rec.WaitFor(0.0, {"main": 3}), Sender(DIGEST, "observer", "o", "s")),
    ]  # fmt: skip
    wild = Wild(store.url)
    before = rss_mb()
    for number in range(n):
        if number % 50 == 49:
            assert (
                wild.ask(codec.encode([9, ["", "", "", ""], []])) is not None
            )  # everything before is handled
            wild.close()
            wild = Wild(store.url)
        bad = bytearray(rng.choice(requests))
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        wild.send(bytes(bad))
    wild.close()
    return rss_mb() - before
