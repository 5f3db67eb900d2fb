"""The link alone: requests, records and trajectories over loopback tcp, with and without encryption.

    python -m bench.bench_link [--quick] [--json out.json]

Wall time for everything that waits for the other process, thread CPU time for the codec. The server is a
process of its own. Raw loopback tcp (one stream of the same bytes, no framing) is measured in the same
rounds.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.common import Comparison, Report, interleave, parser
from mgrpo.store.records import InvocationDone
from mgrpo.transport import codec
from mgrpo.transport.client import Client
from mgrpo.transport.codec import Sender
from mgrpo.transport.keys import ClientKeys, ServerKeys, add_key, init_keys
from mgrpo.transport.server import Reply, Server, pack

SMALL, MIDDLE, LARGE = 200, 20_000, 400_000
WINDOWS = (1, 16, 64, 256)


def serve(keys: str) -> None:
    """The other process: takes records and answers nothing but an acknowledgement."""
    security = ServerKeys(keys) if keys else None
    with Server("tcp://127.0.0.1:0", {"take": lambda request: Reply()}, security=security) as server:
        print(server.url, flush=True)
        sys.stdin.read()


def sink() -> None:
    """Raw tcp: reads everything, answers one byte at the end of each stream."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                buffer = bytearray(1 << 20)
                while connection.recv_into(buffer):
                    pass
                connection.sendall(b"x")


@contextmanager
def part(*call: str) -> Iterator[str]:
    command = [sys.executable, "-m", "bench.bench_link", "--part", json.dumps(call)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def one_by_one(client: Client, n: int) -> float:
    """Median milliseconds of a request and its answer."""
    body, took = bytes(SMALL), []
    for _ in range(n):
        began = time.perf_counter()
        client.call("take", body)
        took.append(time.perf_counter() - began)
    return 1e3 * statistics.median(took)


def pipelined(client: Client, size: int, n: int) -> float:
    """Requests a second with the client's window full; small ones travel in the header, others as frames."""
    body, frames = (bytes(size), ()) if size <= 1000 else (None, (bytes(size),))
    began = time.perf_counter()
    for _ in range(n):
        client.submit("take", body, frames)
    client.flush(60)
    return n / (time.perf_counter() - began)


def raw_tcp(port: int, n_bytes: int) -> float:
    """MB a second of one plain stream."""
    block = bytes(LARGE)
    with socket.create_connection(("127.0.0.1", port)) as stream:
        began = time.perf_counter()
        for _ in range(n_bytes // LARGE):
            stream.sendall(block)
        stream.shutdown(socket.SHUT_WR)
        stream.recv(1)
        return n_bytes / (time.perf_counter() - began) / 1e6


def codec_figures(report: Report, rounds: int) -> None:
    """Statistics records: encoded, packed into messages, and decoded again."""
    record = InvocationDone("12/7", 3, 0, "sub", 5, 240, 11, 11, {"format": 1.0, "expert": 0.0}, None)
    raw = msgspec.Raw(codec.encode(record))
    body = codec.encode(record)
    items = [(i, "invocation_done", body, ()) for i in range(64)]
    header = pack(items, Sender("digest", "worker", "w", "s"))[0][0]
    times = interleave(
        {
            "encode": lambda: codec.encode(record),
            "pack 64": lambda: pack(items, Sender("digest", "worker", "w", "s")),
            "decode 64": lambda: codec.decode_batch(header, 0, codec.Limits()),
            "decode body": lambda: codec.decode(raw, InvocationDone),
        },
        rounds,
        calls={"encode": 2000, "pack 64": 50, "decode 64": 50, "decode body": 2000},
    )
    report.figure("encode a statistics record", 1e3 / times["encode"].median, "/s", at_least=1e6)
    report.figure("pack 64 records to a message", 64e3 / times["pack 64"].median, "/s")
    report.figure("unpack a message of 64", 64e3 / times["decode 64"].median, "/s")
    report.figure("decode a record's body", 1e3 / times["decode body"].median, "/s")


def main() -> int:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--part", help="for the processes of this bench")
    args = p.parse_args()
    if args.part:
        name, *rest = json.loads(args.part)
        globals()[name](*rest)
        return 0
    report = Report("bench_link")
    rounds, scale = (3, 1) if args.quick else (7, 3)
    codec_figures(report, rounds)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        init_keys(keys)
        key = ClientKeys.load(add_key(keys, "bench", "worker"))
        with part("serve", "") as plain, part("serve", str(keys)) as curve, part("sink") as port:
            for _ in range(rounds):
                take(samples, "raw tcp", raw_tcp(int(port), 200_000_000 * scale))
                for name, url, security in (("", plain, None), (" CURVE", curve, key)):
                    measure(samples, name, url, security, scale)
    middle = {name: statistics.median(values) for name, values in samples.items()}
    write(report, middle)
    return report.finish(args)


def measure(samples: dict[str, list[float]], name: str, url: str, key: ClientKeys | None, scale: int) -> None:
    sender = Sender(role="worker")  # the key's role
    for window in WINDOWS:
        with Client(url, window=window, security=key, sender=sender) as client:
            client.call("take")
            if window == 1:
                take(samples, f"p50{name}", one_by_one(client, 200 * scale))
            take(
                samples,
                f"200 B window {window}{name}",
                pipelined(client, SMALL, (100 if window == 1 else 4000) * scale),
            )
    with Client(url, window=64, security=key, sender=sender) as client:
        client.call("take")
        take(samples, f"20 KB{name}", pipelined(client, MIDDLE, 1000 * scale) * MIDDLE / 1e6)
        take(samples, f"400 KB{name}", pipelined(client, LARGE, 150 * scale) * LARGE / 1e6)


def take(samples: dict[str, list[float]], name: str, value: float) -> None:
    samples.setdefault(name, []).append(value)


def write(report: Report, middle: dict[str, float]) -> None:
    report.figure("raw loopback tcp", middle["raw tcp"], "MB/s")
    for name in ("", " CURVE"):
        report.figure(f"200 B request and answer, p50{name}", middle[f"p50{name}"], "ms")
        for window in WINDOWS:
            report.figure(f"200 B, window {window}{name}", middle[f"200 B window {window}{name}"], "/s")
        report.figure(f"20 KB, window 64{name}", middle[f"20 KB{name}"], "MB/s")
        floor = 200 if name else None
        large = middle[f"400 KB{name}"]
        report.figure(f"400 KB, window 64{name}", large, "MB/s", at_least=floor)
        raw = middle["raw tcp"]
        against = Comparison(large, floor=raw, floor_name="raw tcp", unit="MB/s", more_is_better=True)
        report.compare(f"raw tcp / 400 KB, window 64{name}", against)


if __name__ == "__main__":
    sys.exit(main())
