"""A TCP proxy that misbehaves on command: black hole, reset, one way, delay, trickle."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import mgrpo
from mgrpo.store.server import StoreServer
from tests.store_kit import DIGEST, publish, run_params

FAULTS = ("black hole", "reset", "one way", "delay", "trickle")


@dataclass
class _Pipe:
    """One direction of one connection: bytes with the time from which they may go on."""

    source: socket.socket
    target: socket.socket
    upwards: bool
    held: deque[tuple[float, bytes]] = field(default_factory=deque)
    free_at: float = 0.0  # when the link has room for more, at a bounded rate


class Proxy:
    """Forwards 127.0.0.1:port to target; `mode` is "pass" or one of FAULTS. rate: bytes a second and direction of each
    connection (0: as fast as it goes). answered: bytes that came from the target."""

    def __init__(self, target: int, rate: float = 0.0) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self.mode = "pass"
        self.rate, self.answered = rate, 0
        self._pipes: list[_Pipe] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._listener.close()
        for pipe in list(self._pipes):
            self._drop(pipe)

    def _run(self) -> None:
        while not self._stop.is_set():
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                for pipe in self._pipes:
                    if len(pipe.held) < (2 if self.rate else 64):
                        selector.register(pipe.source, selectors.EVENT_READ, pipe)
                ready = [key for key, _ in selector.select(0.005)]
            for key in ready:
                if key.data is None:
                    self._accept()
                elif key.data in self._pipes:
                    self._read(key.data)
            if self.mode == "reset":
                for pipe in list(self._pipes):
                    self._drop(pipe)
            for pipe in list(self._pipes):
                self._forward(pipe)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=1)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes += [_Pipe(client, server, True), _Pipe(server, client, False)]

    def _read(self, pipe: _Pipe) -> None:
        try:
            data = pipe.source.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._drop(pipe)
            return
        self.answered += 0 if pipe.upwards else len(data)
        wait = 0.2 if self.mode == "delay" else 0.0
        pipe.held.append((time.monotonic() + wait, data))

    def _forward(self, pipe: _Pipe) -> None:
        blocked = self.mode == "black hole" or (self.mode == "one way" and not pipe.upwards)
        while pipe.held and not blocked and pipe.held[0][0] <= time.monotonic():
            if self.rate and pipe.free_at > time.monotonic():
                return
            at, data = pipe.held.popleft()
            if self.rate:
                pipe.free_at = max(pipe.free_at, time.monotonic() - 0.05) + len(data) / self.rate
            if self.mode == "trickle" and len(data) > 20:
                pipe.held.appendleft((at, data[20:]))
                data, blocked = data[:20], True
            try:
                pipe.target.sendall(data)
            except OSError:
                self._drop(pipe)
                return

    def _drop(self, pipe: _Pipe) -> None:
        for other in [p for p in self._pipes if p.source in (pipe.source, pipe.target)]:
            self._pipes.remove(other)
            other.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            other.source.close()


def proxy_faults(folder: Path, n: int, seed: int) -> dict[str, object]:
    """n faults under load; counts lost records and how long after each fault a fresh request is acknowledged."""
    rng = random.Random(seed)
    recovery: list[float] = []
    with StoreServer("tcp://127.0.0.1:0", folder / "s.db", run_params(max_lag=1000)) as store:
        for role in ("main", "sub"):
            publish(store.url, role).close()
        proxy = Proxy(int(store.url.rpartition(":")[2]))
        with mgrpo.connect(f"tcp://127.0.0.1:{proxy.port}", role="worker", run=DIGEST, timeout=60) as worker:
            group = worker.open_group(query="q", k=2, d_max={}, index=0)
            sent = 0
            for fault in range(n):
                proxy.mode = FAULTS[fault % len(FAULTS)]
                end = time.monotonic() + rng.uniform(0.1, 1.0)
                while time.monotonic() < end:
                    worker.invocation_done(group, 0, role="sub", invocation=sent, n_tokens=sent)
                    sent += 1
                    time.sleep(0.01)
                proxy.mode = "pass"
                healed = time.monotonic()
                worker.invocation_done(group, 0, role="sub", invocation=sent, n_tokens=sent).result(60)
                sent += 1
                recovery.append(time.monotonic() - healed)
                group._waiting.clear()
            worker.flush(60)
            resent = worker._link.resent
        proxy.close()
        stored = store._database._db.execute("SELECT count(*) FROM invocations").fetchone()[0]
    recovery.sort()
    return {
        "faults": n,
        "sent": sent,
        "lost": sent - stored,
        "resent": resent,
        "recovery_p95_s": round(recovery[int(0.95 * (n - 1))], 3),
    }
