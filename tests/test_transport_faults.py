"""The link under faults of the network, of peers and of the disk: typed errors in time, and it goes on
afterwards."""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import mgrpo
from mgrpo.errors import DeadlineError, PeerError
from mgrpo.store.database import connect_sqlite
from mgrpo.store.server import StoreServer
from mgrpo.trajectory_log.client import TrajectoryLogClient
from mgrpo.transport import codec
from mgrpo.transport.client import Client
from mgrpo.transport.codec import BadMessage, Limits, Sender
from mgrpo.transport.server import Reply, Request, Server
from mgrpo.weights.pull import fetch_weights
from tests.chaos.kills import ROOT, running_store
from tests.chaos.proxy import proxy_faults
from tests.stopped import stand_still
from tests.store_kit import DIGEST, fill, make_trajectory, publish, rss_mb, run_params


def test_proxy_faults_lose_nothing(tmp_path: Path) -> None:
    """Five faults, one of each kind; tests/chaos makes 50 and reports the recovery times."""
    result = proxy_faults(tmp_path, 5, seed=1)
    assert result["lost"] == 0, result


def test_a_stopped_store_is_a_deadline_error_and_work_goes_on_when_it_wakes(tmp_path: Path) -> None:
    """SIGSTOP: the error names peer, step and queue within its timeout plus a second."""
    with running_store(tmp_path) as store:
        with mgrpo.connect(store.url, role="trainer:main", run=DIGEST, timeout=60) as trainer:
            trainer.resume(-1)
            trainer.step = 4
            stand_still(store.process.pid)
            started = time.monotonic()
            with pytest.raises(DeadlineError, match=r"store at ipc.*claim\(2 groups of 'main'\) at step 4"):
                trainer.claim(2, timeout=1.0)
            assert time.monotonic() - started < 2.0
            os.kill(store.process.pid, signal.SIGCONT)
            trainer.status(version=0, step=-1, checkpoint_step=-1)


class FaultyDisk:
    """sqlite3 whose COMMIT fails while `error` is set, as on a full, broken or read-only disk."""

    error = ""

    def __init__(self, path: str) -> None:
        self._db: Any = connect_sqlite(path)

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        if sql == "COMMIT" and FaultyDisk.error:
            self._db.execute("ROLLBACK")
            raise sqlite3.OperationalError(FaultyDisk.error)
        return self._db.execute(sql, parameters)

    def executemany(self, sql: str, rows: Any) -> Any:
        return self._db.executemany(sql, rows)

    def close(self) -> None:
        self._db.close()


@pytest.mark.parametrize(
    "error", ["database or disk is full", "disk I/O error", "attempt to write a readonly database"]
)
def test_no_ack_without_commit_and_recovery_when_the_disk_is_back(tmp_path: Path, error: str) -> None:
    """While commits fail nothing is acknowledged; afterwards the very same requests are, and nothing was lost."""
    with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params(), connect=FaultyDisk) as store:
        main = publish(store.url, "main")
        publish(store.url, "sub").close()
        with mgrpo.connect(store.url, role="worker", run=DIGEST) as worker:
            fill(worker, "a", index=0)
            worker.flush()
            group = worker.open_group(query="b", k=2, d_max={}, index=1)
            FaultyDisk.error = error
            try:
                futures = [
                    worker.invocation_done(group, 0, role="sub", invocation=i, n_tokens=i) for i in range(20)
                ]
                time.sleep(0.6)
                assert not any(future.done() for future in futures)
            finally:
                FaultyDisk.error = ""
            for future in futures:
                future.result(10)
            assert store.counters()["UNAVAILABLE"] > 0
            assert [g.query for g in main.claim(1, timeout=60)] == ["a"]
        main.close()


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A file system of 3 MiB fills up: no acknowledgement beyond what fits, recovery once there is room again."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        (small / "ballast").write_bytes(bytes(2 << 20))
        with StoreServer("tcp://127.0.0.1:0", small / "s.db", run_params()) as store:
            for role in ("main", "sub"):
                publish(store.url, role).close()
            with mgrpo.connect(store.url, role="worker", run=DIGEST, timeout=60) as worker:
                group = worker.open_group(query="a", k=2, d_max={}, index=0)
                scores = {"x" * 200: 1.0}
                futures = []
                while store.counters().get("UNAVAILABLE", 0) == 0 and len(futures) < 20_000:
                    futures += [
                        worker._link.submit("invocation_done", _record(group, len(futures) + i, scores))
                        for i in range(100)
                    ]
                    time.sleep(0.02)
                assert store.counters()["UNAVAILABLE"] > 0
                (small / "ballast").unlink()
                for future in futures:
                    future.result(30)
                rows = worker._link.call("open_groups", ("", 0, 100)).decode(list)
                assert len(rows) == 1
            stored = store._database._db.execute("SELECT count(*) FROM invocations").fetchone()[0]
            assert stored == len(futures)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _record(group: Any, invocation: int, scores: dict[str, float]) -> tuple[Any, ...]:
    return (group.query, invocation // 60_000, 0, "sub", invocation % 60_000, 1, -1, -1, scores, None)


def echo_server(**options: Any) -> Server:
    return Server("tcp://127.0.0.1:0", {"echo": lambda r: Reply(None, r.frames)}, **options)


def test_mutated_headers_are_named_refusals() -> None:
    """20,000 mutated headers: decoded or BadMessage, never anything else; tests/chaos feeds a million."""
    assert fuzz_headers(20_000, seed=1) > 10_000


def fuzz_headers(n: int, seed: int) -> int:
    """Feed n mutated headers to the decoder; returns how many were refused."""
    rng = random.Random(seed)
    items = [codec.Item(7, "invocation_done", msgspec.Raw(codec.encode(["q", 1, 0, "sub", {"s": 1.0}])))]
    good = codec.encode_batch(Sender("digest", "worker", "w", "s"), items * 3)
    refused = 0
    for _ in range(n):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            what = rng.randrange(3)
            at = rng.randrange(len(bad))
            if what == 0:
                bad[at] = rng.randrange(256)
            elif what == 1:
                del bad[at : at + rng.randrange(1, 4)]
            else:
                bad[at:at] = rng.randbytes(rng.randrange(1, 4))
            bad = bad or bytearray(b"\0")
        try:
            batch = codec.decode_batch(bytes(bad), 0, Limits())
            for item in batch.items:
                codec.decode(item.body, tuple[str, int, int, str, dict[str, float]])
        except BadMessage:
            refused += 1
    return refused


def test_garbage_oversize_and_half_open_connections_do_not_disturb_others() -> None:
    """Raw bytes instead of ZMTP, frames over the limit, silent connections: the server goes on, RSS stays."""
    with echo_server(limits=Limits(header=1 << 10, frame=1 << 20, message=2 << 20)) as server:
        host, port = "127.0.0.1", int(server.url.rpartition(":")[2])
        rng = random.Random(1)
        before = rss_mb()
        half_open = [socket.create_connection((host, port)) for _ in range(50)]
        for _ in range(100):
            with socket.create_connection((host, port)) as raw:
                raw.sendall(rng.randbytes(rng.randrange(1, 2000)))
        wide = Limits(header=1 << 20, frame=64 << 20, message=64 << 20)
        with Client(server.url, timeout=1.5, limits=wide, resend_s=0.3) as reckless:
            with pytest.raises(DeadlineError):
                reckless.call("echo", None, [bytes(2 << 20)])  # libzmq cuts the line without a word
        with Client(server.url, timeout=10, limits=wide) as reckless:
            with pytest.raises(PeerError, match=r"BAD_REQUEST.*message of"):
                reckless.call("echo", None, [bytes(1 << 20)] * 3)
        with Client(server.url, timeout=10, limits=Limits(frame=1 << 20, message=2 << 20)) as careful:
            with pytest.raises(ValueError, match="the limit is 1048576"):
                careful.call("echo", None, [bytes(2 << 20)])
            assert bytes(careful.call("echo", None, [b"still here"]).frames[0]) == b"still here"
        for connection in half_open:
            connection.close()
        assert rss_mb() - before < 100


def test_a_peer_that_keeps_sending_garbage_is_cut_off() -> None:
    """A hundred malformed messages a minute; another peer is served all the while."""
    with echo_server() as server, Client(server.url, timeout=1.0) as bad, Client(server.url) as good:
        for _ in range(101):
            try:
                bad.call("nothing", None)
            except PeerError as error:
                assert "BAD_REQUEST" in str(error)
            except DeadlineError:
                break
        with pytest.raises(DeadlineError):
            bad.call("echo", None)
        assert server.counters["cut_off"] > 0
        good.call("echo", None)


def test_a_full_socket_sends_nothing_twice() -> None:
    """A window wider than the socket's queue and records of 100 KB: each reaches the server once, in order."""
    seen: list[int] = []

    def take(request: Request) -> Reply:
        time.sleep(0.0005)
        seen.append(request.decode(int))
        return Reply()

    with Server("tcp://127.0.0.1:0", {"take": take}) as server:
        with Client(server.url, window=256, resend_s=30, timeout=60) as client:
            for number in range(600):
                client.submit("take", number, [b"x" * 100_000])
            client.flush(60)
    assert seen == list(range(600))


LOG_SERVER = """
import sys
from mgrpo.trajectory_log.log import TrajectoryLog
from mgrpo.transport.server import Server
import torch
from mgrpo.weights.publisher import WeightPublisher
from tests.store_kit import DIGEST
weights = WeightPublisher()
weights.publish("e1.v3", 3, [("w", torch.zeros(1))])
with TrajectoryLog(sys.argv[2], role="sub", digest=DIGEST) as trajectory_log:
    with Server(sys.argv[1], {**trajectory_log.handlers(), **weights.handlers()}, barrier=trajectory_log.sync):
        sys.stdin.read()
"""


def test_a_stopped_trainer_is_a_deadline_error_to_its_workers(tmp_path: Path) -> None:
    """SIGSTOP while trajectories and weights are asked for: peer, queue and step, and both go on when it wakes."""
    url = f"ipc://{tmp_path}/sub"
    with subprocess.Popen(
        [sys.executable, "-c", LOG_SERVER, url, str(tmp_path / "trajectories")],
        stdin=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        try:
            with (
                TrajectoryLogClient(url, digest=DIGEST, role="sub", timeout=30) as trajectory_log,
                Client(url, peer="trainer sub", timeout=30) as weights,
            ):
                trajectory_log.append(make_trajectory("7/56", 0, "sub", 0)).result(30)
                stand_still(process.pid)
                trajectory_log._link.timeout = 1.0
                started = time.monotonic()
                with pytest.raises(DeadlineError, match=rf"trajectory log of sub at {url}: append\('7/56'\)"):
                    trajectory_log.append(make_trajectory("7/56", 1, "sub", 0)).result(30)
                assert time.monotonic() - started < 2.0
                weights.shorten_deadlines(1.0)
                started = time.monotonic()
                with pytest.raises(DeadlineError, match=rf"trainer sub at {url}: weights.get at step 4"):
                    fetch_weights(weights, "e1.v3", 4, 30.0)
                assert time.monotonic() - started < 2.0
                os.kill(process.pid, signal.SIGCONT)
                trajectory_log._link.timeout = 30.0
                assert trajectory_log.append(make_trajectory("7/56", 1, "sub", 0)).result(30).segment == 1
            with Client(url, peer="trainer sub", timeout=30) as weights:
                assert fetch_weights(weights, "", 3, 1.0) is not None
        finally:
            process.kill()
