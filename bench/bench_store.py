"""Durable acknowledgements: records a second that are on disk before they are answered.

    python -m bench.bench_store [--quick] [--json out.json]

Wall time, since most of it is the disk's. In the same run and taking turns: 1 and 4 client processes against
the store over loopback tcp, NULL and CURVE; raw fdatasync of 4 KiB appends; and the in-memory HTTP list store
(list_store.py) with the same number of clients, which keeps nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.common import Comparison, Report, Timing, parser
from mgrpo.store.client import LauncherClient
from mgrpo.store.records import RunParams
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.store.worker_client import WorkerClient
from mgrpo.transport.keys import ClientKeys, add_key, init_keys

WINDOW = 1024
RECORD = {"n_tokens": 123, "version_min": 4, "version_max": 5, "scores": {"format": 1.0, "expert": 0.5}}


def load(url: str, number: int, seconds: float, key: str) -> None:
    """One client process: pipelined records for `seconds`; prints how many were acknowledged, and the
    latencies."""
    keys = ClientKeys.load(key) if key else None
    took: list[float] = []
    with WorkerClient(url, name=f"load{number}-{os.getpid()}", key=keys) as worker:
        group = worker.open_group(
            query=f"{number}-{os.getpid()}", k=8, d_max={}, index=os.getpid(), timeout=30
        )
        print("ready", flush=True)
        sys.stdin.readline()
        end = time.monotonic() + seconds
        sent = 0
        while time.monotonic() < end:
            began = time.monotonic()
            future = worker.invocation_done(
                group,
                sent % 8,
                role="sub",
                invocation=sent // 8,
                n_tokens=123,
                versions=(4, 5),
                scores=RECORD["scores"],
            )
            future.add_done_callback(lambda _, began=began: took.append(time.monotonic() - began))
            sent += 1
            if sent % 1000 == 0:
                group._waiting.clear()
        worker.flush(30)
    print(json.dumps([len(took), statistics.median(took)]), flush=True)


def load_http(port: int, seconds: float) -> None:
    """One client process of the rival: one request at a time on a kept connection, as its client library does."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    took: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        connection.request("POST", "/push", json.dumps(RECORD), {"Content-Type": "application/json"})
        connection.getresponse().read()
        took.append(time.monotonic() - began)
    print(json.dumps([len(took), statistics.median(took)]), flush=True)


def clients(n: int, *call: object) -> tuple[float, float]:
    """(operations a second, median latency in ms) of n client processes running `call` at the same time."""
    started = [spawn(*(number if a == "NUMBER" else a for a in call)) for number in range(n)]
    for process in started:
        process.stdout.readline()
    began = time.monotonic()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    done = [json.loads(process.stdout.readline()) for process in started]
    seconds = time.monotonic() - began
    for process in started:
        process.wait()
    return sum(count for count, _ in done) / seconds, 1e3 * statistics.median(p50 for _, p50 in done)


def spawn(*call: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.bench_store", "--part", json.dumps(call)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def store(folder: Path, keys: Path | None = None) -> Iterator[str]:
    """A store process with a run that admits everything."""
    key_folder = str(keys) if keys else ""
    process = spawn("serve", str(folder), key_folder)
    url = process.stdout.readline().strip()

    def key(name: str) -> ClientKeys | None:
        return ClientKeys.load(keys / f"{name}.key") if keys else None

    with LauncherClient(url, "launcher", key=key("launcher")) as launcher:
        launcher.create(RunParams("bench", "bench", ["main", "sub"], ["main"], 8, 4096, max_lag=4096))
    with TrainerClient(url, "trainer:main", key=key("trainer")) as trainer:
        trainer.resume(-1)
        trainer.status(version=0, step=-1, checkpoint_step=-1)
    try:
        yield url
    finally:
        process.stdin.close()
        process.wait(10)


def serve(folder: str, key_folder: str) -> None:
    from mgrpo.store.server import StoreServer
    from mgrpo.transport.keys import ServerKeys

    security = ServerKeys(key_folder) if key_folder else None
    with StoreServer("tcp://127.0.0.1:0", Path(folder) / "s.db", security=security) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(f"{server._database.rows} {server._database.commits}", file=sys.stderr)


def raw_fsync(folder: Path, seconds: float) -> float:
    """fdatasync calls a second after 4 KiB appends to a file beside the store."""
    descriptor = os.open(folder / "raw", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    count, block, end = 0, bytes(4096), time.monotonic() + seconds
    while time.monotonic() < end:
        os.write(descriptor, block)
        os.fdatasync(descriptor)
        count += 1
    os.close(descriptor)
    return count / seconds


@contextmanager
def list_store() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "bench.list_store", str(port)])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def records_per_commit(url: str, key: ClientKeys | None) -> float:
    with LauncherClient(url, "launcher", key=key) as launcher:
        launcher.attach()
        stats = launcher.stats()
        return float(stats["rows"]) / float(stats["commits"])


def main() -> int:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--part", help="for the processes of this bench")
    args = p.parse_args()
    if args.part:
        name, *rest = json.loads(args.part)
        globals()[name](*rest)
        return 0
    rounds, seconds = (2, 1.5) if args.quick else (5, 3.0)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "bench") as name, list_store() as port:
        folder = Path(name)
        keys = folder / "keys"
        init_keys(keys)
        for peer, role in (("launcher", "launcher"), ("trainer", "trainer:main"), ("worker", "worker")):
            add_key(keys, peer, role)
        (folder / "null").mkdir()
        (folder / "curve").mkdir()
        with store(folder / "null") as url, store(folder / "curve", keys) as curve_url:
            for _ in range(rounds):
                take(samples, "1 client", *clients(1, "load", url, "NUMBER", seconds, ""))
                take(samples, "4 clients", *clients(4, "load", url, "NUMBER", seconds, ""))
                take(samples, "raw fsync", raw_fsync(folder, seconds / 3), 0.0)
                curve = clients(4, "load", curve_url, "NUMBER", seconds, str(keys / "worker.key"))
                take(samples, "4 clients CURVE", *curve)
                take(samples, "http rival", *clients(4, "load_http", port, seconds))
            per_commit = records_per_commit(url, None)
    return report(samples, per_commit).finish(args)


def take(samples: dict[str, list[float]], name: str, rate: float, latency_ms: float) -> None:
    samples.setdefault(name, []).append(rate)
    samples.setdefault(f"{name} p50", []).append(latency_ms)


def report(samples: dict[str, list[float]], per_commit: float) -> Report:
    middle = {name: statistics.median(values) for name, values in samples.items()}
    out = Report("bench_store")
    bound = 0.3 * per_commit * middle["raw fsync"]
    out.figure("durable acks, 4 clients", middle["4 clients"], "/s", at_least=min(10_000, bound))
    out.figure("p50 of an ack, 4 clients", middle["4 clients p50"], "ms", note=f"window {WINDOW} a client")
    out.figure("durable acks, 1 client", middle["1 client"], "/s")
    out.figure("durable acks, 4 clients, CURVE", middle["4 clients CURVE"], "/s")
    out.figure("records per fsync", per_commit)
    out.figure("raw fsync", middle["raw fsync"], "/s", note="4 KiB appends, fdatasync")
    out.figure("HTTP list store, 4 clients", middle["http rival"], "/s", note="in memory, keeps nothing")
    against = Comparison(
        Timing(tuple(samples["4 clients"])),
        {"HTTP list store": Timing(tuple(samples["http rival"]))},
        floor=per_commit * middle["raw fsync"],
        floor_name="raw fsync, as many records in each",
        unit="/s",
        more_is_better=True,
    )
    out.compare("against the HTTP list store", against, at_least=10)
    return out


if __name__ == "__main__":
    sys.exit(main())
