"""The link where something is slow, full, dead or IPv6: each request travels once, and who waits is given the cause."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import mgrpo
from mgrpo.errors import ConfigError, DeadlineError, GroupClosedError, MgrpoError, PeerError
from mgrpo.store.database import connect_sqlite
from mgrpo.store.server import StoreServer
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.trajectory_log.log import TrajectoryLog
from mgrpo.transport import codec
from mgrpo.transport.address import Socket, check_url, is_private, needs_ipv6
from mgrpo.transport.client import Client
from mgrpo.transport.keys import ClientKeys, ServerKeys, add_key, init_keys
from mgrpo.transport.server import Handler, Park, Reply, Request, Server
from tests.chaos.proxy import Proxy
from tests.store_kit import DIGEST, fill, make_trajectory, publish, run_params, same

MIB = 1 << 20


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not within 60 s: {what}"
        time.sleep(0.01)


def test_an_answer_that_is_long_under_way_is_asked_for_once() -> None:
    """A frame of 6 MiB at 2 MiB/s: three seconds, longer than any resend or heartbeat of before; 100 small requests
    wait behind it. Each is handled once."""
    seen: Counter[str] = Counter()

    def large(request: Request) -> Reply:
        seen["large"] += 1
        return Reply(None, [bytes(6 * MIB)])

    def small(request: Request) -> Reply:
        seen["small"] += 1
        return Reply(request.decode(int))

    with Server("tcp://127.0.0.1:0", {"large": large, "small": small}) as server:
        proxy = Proxy(int(server.url.rpartition(":")[2]), 2 * MIB)
        with Client(f"tcp://127.0.0.1:{proxy.port}", timeout=60) as client:
            answer = client.submit("large")
            rest = [client.submit("small", number) for number in range(100)]
            assert len(answer.result(60).frames[0]) == 6 * MIB
            assert [future.result(60).decode(int) for future in rest] == list(range(100))
            assert client.resent == 0
        proxy.close()
    assert seen == {"large": 1, "small": 100} and proxy.answered < 1.02 * 6 * MIB + 100_000


def test_trajectories_over_a_slow_link_are_sent_once_and_moving_ones_are_not_late(tmp_path: Path) -> None:
    """Nine trajectories of 520 KB at 1 MiB/s: four and a half seconds, with a deadline of three. It counts from the
    last answer, so none is late and none is sent twice."""
    with TrajectoryLog(tmp_path / "trajectories", role="sub", digest=DIGEST) as trajectory_log:
        with Server("tcp://127.0.0.1:0", trajectory_log.handlers(), barrier=trajectory_log.sync) as server:
            proxy = Proxy(int(server.url.rpartition(":")[2]), MIB)
            with TrajectoryLogClient(
                f"tcp://127.0.0.1:{proxy.port}", digest=DIGEST, role="sub", timeout=3.0
            ) as client:
                sent = [make_trajectory("q", i, "sub", 0, 40_000) for i in range(9)]
                began = time.monotonic()
                refs = [future.result(60) for future in [client.append(t) for t in sent]]
                assert time.monotonic() - began > 3.0, "the link was not slow"
                assert client._link.resent == 0
            proxy.close()
        assert all(same(trajectory_log.read(ref), t) for ref, t in zip(refs, sent, strict=True))


def test_answers_for_a_peer_that_does_not_read_wait_for_it() -> None:
    """A raw peer asks 600 times and reads nothing meanwhile: its connection is full. Every answer comes when it
    reads, and others are served all the while."""
    with Server("tcp://127.0.0.1:0", {"get": lambda r: Reply(r.decode(int), [bytes(70_000)])}) as server:
        lazy: Socket = zmq.Context.instance().socket(zmq.DEALER)
        lazy.setsockopt(zmq.LINGER, 0)
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.setsockopt(zmq.RCVBUF, 4096)
        lazy.setsockopt(zmq.RCVTIMEO, 60_000)
        lazy.connect(server.url)
        try:
            for number in range(1, 601):
                item = codec.Item(number, "get", msgspec.Raw(codec.encode(number)))
                lazy.send(codec.encode_batch(codec.Sender(), [item]))
            with Client(server.url, timeout=60) as other:
                until(lambda: server._waiting, "a full connection")
                assert other.call("get", 7).decode(int) == 7
            got = []
            for _ in range(600):
                header, *_ = lazy.recv_multipart()
                got.append(codec.decode_batch(header, 1, codec.Limits()).items[0].id)
            assert got == list(range(1, 601)) and server.counters["undelivered"] == 0
        finally:
            lazy.close()


class Broken:
    """A handler and a tick that fail on command, as a fault of ours would."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def tick(self) -> None:
        if self.now.is_set():
            raise KeyError("q7")


def test_a_server_whose_thread_dies_says_so_to_everybody() -> None:
    """Who waits, and who asks later, gets a PeerError with the cause long before the deadline; check() raises it for
    the process around the server."""
    broken = Broken()
    handlers: dict[str, Handler] = {
        "wait": lambda request: Park(lambda: None, 600.0),
        "get": lambda request: Reply(1),
    }
    with Server("tcp://127.0.0.1:0", handlers, tick=broken.tick) as server:
        with Client(server.url, peer="trainer sub", timeout=600.0) as client:
            assert client.call("get").decode(int) == 1
            server.check()
            waiting = client.submit("wait")
            until(lambda: server._parked, "the request")
            broken.now.set()
            with pytest.raises(PeerError, match=r"trainer sub at tcp.*has stopped: KeyError: 'q7'"):
                waiting.result(60)
            with pytest.raises(MgrpoError, match=rf"the server at {server.url} has stopped: KeyError: 'q7'"):
                server.check()
            with pytest.raises(PeerError, match="has stopped: KeyError: 'q7'"):
                client.call("get")
        with (
            Client(server.url, timeout=600.0) as later,
            pytest.raises(PeerError, match="has stopped: KeyError"),
        ):
            later.call("get")


def test_a_store_whose_thread_dies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its process through check(), and by its clients."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params()) as store:
        with publish(store.url, "main") as trainer:
            store.check()
            waiting = trainer._link.submit("wait", (5.0, {"main": 9}, 0, "", -1), timeout=600.0)
            monkeypatch.setattr(store._core, "tick", _fails)
            with pytest.raises(PeerError, match=r"store at tcp.*has stopped: KeyError: 'q7'"):
                waiting.result(60)
        with pytest.raises(MgrpoError, match="has stopped: KeyError"):
            store.check()


def _fails(now: float) -> None:
    raise KeyError("q7")


class FullDisk:
    """sqlite3 on a disk without room for more, while `error` is set."""

    error = ""

    def __init__(self, path: str) -> None:
        self._db: Any = connect_sqlite(path)

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        if FullDisk.error and sql.startswith(("BEGIN", "COMMIT")):
            raise sqlite3.OperationalError(FullDisk.error)
        return self._db.execute(sql, parameters)

    def executemany(self, sql: str, rows: Any) -> Any:
        return self._db.executemany(sql, rows)

    def close(self) -> None:
        self._db.close()


@pytest.mark.parametrize("error", ["database or disk is full", "unable to open database file"])
def test_who_waits_for_a_store_is_given_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """Not only that nobody answered: also while the file is read again, and for a claim that waits."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(), connect=FullDisk) as store:
        with publish(store.url, "main") as trainer:
            monkeypatch.setattr(FullDisk, "error", error)
            for _ in range(2):
                with pytest.raises(
                    DeadlineError, match=rf"its last answer: the file .*s\.db does not work: {error}"
                ):
                    trainer._link.call("report", (1, "phase", {"text": "x"}), timeout=1.5)
            with pytest.raises(DeadlineError, match=rf"claim\(1 groups of 'main'\).*{error}"):
                trainer.claim(1, timeout=1.0)
            monkeypatch.setattr(FullDisk, "error", "")
            trainer.report("phase", {"text": "y"})


def test_a_store_that_cannot_have_its_file_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder, a file in its place, a full disk: named before anything is served."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "s.db", tmp_path / "file" / "s.db"):
        with pytest.raises(ConfigError, match=rf"store {path}: "):
            StoreServer("tcp://127.0.0.1:0", path, run_params())
    monkeypatch.setattr(FullDisk, "error", "database or disk is full")
    with pytest.raises(ConfigError, match=r"s\.db: database or disk is full"):
        StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(), connect=FullDisk)


def test_a_closed_group_is_told_from_a_fault(tmp_path: Path) -> None:
    """The time-out drops a group in its worker's hands: records raise GroupClosedError and mark the group, opening it
    again says that it is closed, and the worker's other groups go on."""
    params = run_params(group_timeout_s=0.5, max_lag=10)
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", params) as store:
        for role in ("main", "sub"):
            publish(store.url, role).close()
        with mgrpo.connect(store.url, role="worker", run=DIGEST, timeout=60) as worker:
            late = worker.open_group(query="a", k=2, d_max={}, index=0)
            assert not late.closed
            until(lambda: worker.stats()["dropped"] == 1, "the time-out")
            record = worker.invocation_done(late, 0, role="main", n_tokens=1)
            end = worker.rollout_final(late, 0, reward=1.0, correct=1.0, d_k={"sub": 0})
            for future in (record, end):
                with pytest.raises(GroupClosedError, match=r"group 'a' is dropped .*store.group_timeout"):
                    future.result(60)
            assert late.closed
            with pytest.raises(GroupClosedError):
                worker.flush(60)
            again = worker.open_group(query="a", k=2, d_max={}, index=0)
            assert again.closed and again.state == "dropped"
            fill(worker, "b", index=1)
            worker.flush(60)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_stores_and_trajectory_logs_are_served_and_reached_over_ipv6(tmp_path: Path) -> None:
    """Plain and encrypted; the bound address has brackets and its port."""
    init_keys(tmp_path / "keys")
    key = ClientKeys.load(add_key(tmp_path / "keys", "t", "trainer:main"))
    for number, security in enumerate((None, ServerKeys(tmp_path / "keys"))):
        params = run_params(training_roles=["main"])
        with StoreServer("tcp://[::1]:0", tmp_path / f"{number}.db", params, security=security) as store:
            assert store.url.startswith("tcp://[::1]:") and int(store.url.rpartition(":")[2]) > 0
            with mgrpo.connect(
                store.url, role="trainer:main", run=DIGEST, key=key if security else None
            ) as trainer:
                trainer.resume(-1)
            with pytest.raises(ConfigError, match="cannot serve"):
                StoreServer(store.url, tmp_path / "other.db", params, security=ServerKeys(tmp_path / "keys"))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_all_interfaces_are_those_of_both_kinds() -> None:
    """tcp://* is reached at an IPv4 and at an IPv6 address, and at the address that the server itself reports."""
    with Server("tcp://*:0", {"get": lambda request: Reply(1)}, insecure=True) as server:
        port = server.url.rpartition(":")[2]
        for url in (f"tcp://127.0.0.1:{port}", f"tcp://[::1]:{port}", server.url):
            with Client(url, timeout=30) as client:
                assert client.call("get").decode(int) == 1


def test_hosts_are_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs IPv6, what stays on this machine, and what is no address."""
    known = {"six": [socket.AF_INET6], "four": [socket.AF_INET], "both": [socket.AF_INET6, socket.AF_INET]}
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port: [(family,) for family in known[host]])
    assert [needs_ipv6(f"tcp://{h}:1") for h in ("six", "four", "both")] == [True, False, False]
    assert (
        needs_ipv6("tcp://[fd00::1]:1") and not needs_ipv6("tcp://10.0.0.1:1") and not needs_ipv6("ipc://a")
    )
    for local in (
        "tcp://[::1]:1",
        "tcp://127.0.0.9:1",
        "tcp://localhost:1",
        "tcp://[::ffff:127.0.0.1]:1",
        "ipc://x",
    ):
        assert is_private(local), local
    for far in (
        "tcp://[fd00::1]:1",
        "tcp://[::]:1",
        "tcp://*:1",
        "tcp://0.0.0.0:1",
        "tcp://[::ffff:10.0.0.1]:1",
    ):
        assert not is_private(far), far
    for wrong, words in (
        ("tcp://fd00::1:5600", r"in brackets, as in tcp://\[fd00::1\]:5600"),
        ("tcp://[fd00::1]", "brackets|port"),
        ("tcp://[fd00::x]:1", "fd00::x"),
        ("tcp://host", "no port"),
        ("tcp://:1", "no host"),
        ("tcp://host:", "no port"),
        ("tcp://host:99999", "99999"),
        ("tcp://host:http", "http"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_url(wrong)
