"""The store as a process part: the ledger on a database file, served on a link.

Each turn of the link's loop runs many requests against the ledger in memory and then commits their rows in one
transaction; only then do the answers leave. When the commit fails (disk full, I/O error) the ledger is read back from
the file, so memory never knows more than the disk, and every peer of the turn is answered UNAVAILABLE and asks again.
"""

from __future__ import annotations

import logging
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from mgrpo.errors import ConfigError, MgrpoError
from mgrpo.store import records as rec
from mgrpo.store.core import Core
from mgrpo.store.database import Connection, Database, connect_sqlite
from mgrpo.store.ledger import LAUNCHER, METHODS
from mgrpo.store.reports import NewestValues
from mgrpo.transport.codec import Limits, Refusal
from mgrpo.transport.keys import ServerKeys
from mgrpo.transport.server import Handler, Park, Reply, Request, Server

log = logging.getLogger("mgrpo.store")
MAX_PARK_S = 5.0  # a long poll is answered "not yet" after this; the caller asks again until its own deadline
REOPEN_S = 0.5
MEASURE_S = 1.0


class StoreServer:
    """Serves the store in `db_path` at `url` from a thread of its own until close().

    params creates the run in a new file, and must equal what an existing file holds (ConfigError otherwise);
    without it a new file waits for a launcher's create(). Raises ConfigError when the address is taken or the
    file in use."""

    def __init__(
        self,
        url: str,
        db_path: str | Path,
        params: rec.RunParams | None = None,
        *,
        security: ServerKeys | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        connect: Callable[[str], Connection] = connect_sqlite,
        synchronous: str = "FULL",
    ) -> None:
        self._database = Database(db_path, connect=connect, synchronous=synchronous)
        self._metrics: dict[str, Any] = {}
        self._measured = 0.0
        self._newest: NewestValues | None = None
        self._broken = 0.0  # when to try the file again; 0: it works
        self._cause = ""  # why it does not
        try:
            self._core = Core(self._database, time.monotonic())
            if params is not None:
                self._core.create(params, time.monotonic())
            handlers: dict[str, Handler] = {method: partial(self._serve, method) for method in METHODS}
            handlers |= {
                "stats": self._stats,
                "create": self._create,
                "trained": self._trained,
                "backup": self._backup,
            }
            self._server = Server(
                url,
                handlers,
                barrier=self._barrier,
                tick=self._tick,
                fault=self._fault,
                limits=limits,
                security=security,
                insecure=insecure,
            )
        except BaseException:
            self._database.close()
            raise
        self.url = self._server.url

    @property
    def failure(self) -> BaseException | None:
        """Why it serves no more, if so."""
        return self._server.failure

    def check(self) -> None:
        """Raises MgrpoError naming address and cause when it serves no more, because of a fault of its own."""
        self._server.check()

    def counters(self) -> dict[str, int]:
        """Refusals and other events by name, for metrics."""
        return dict(self._server.counters) if hasattr(self, "_server") else {}

    def metrics(self) -> dict[str, Any]:
        """Numbers as of the last second; may be called from any thread."""
        return self._metrics

    def newest(self) -> NewestValues:
        """The newest values that were reported, kept from the first call on; may be called from any thread."""
        if self._newest is None:
            self._newest = NewestValues()
        return self._newest

    def close(self) -> None:
        """Answer what is in hand, checkpoint, free address and file. Idempotent."""
        self._server.close()
        self._database.close()

    def __enter__(self) -> StoreServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- durability -----------------------------------------------------------------------------------------

    def _barrier(self) -> None:
        self._check_file()
        try:
            self._core.commit()
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def _check_file(self) -> None:
        if self._broken:
            raise Refusal("UNAVAILABLE", self._unusable())

    def _unreadable(self, error: sqlite3.Error) -> Refusal:
        log.error("store %s: nothing of this turn was stored: %s", self._database.path, error)
        self._fault()
        self._cause = str(error)
        return Refusal("UNAVAILABLE", self._unusable())

    def _unusable(self) -> str:
        why = f"does not work: {self._cause}" if self._cause else "is read again after a fault of the store"
        return f"the file {self._database.path} {why}"

    def _fault(self) -> None:
        """Memory may be ahead of the file: forget it, and read it back at the next tick."""
        self._broken, self._cause = time.monotonic(), ""
        self._core.drop()

    def _tick(self) -> None:
        now = time.monotonic()
        if self._broken and now >= self._broken:
            self._broken = now + REOPEN_S
            try:
                self._database.reopen()
                self._core.reload(now)
            except (sqlite3.Error, MgrpoError) as error:
                log.error("store %s: still not usable: %s", self._database.path, error)
                self._cause = str(error).removeprefix(f"store {self._database.path}: ")
                return
            self._broken = 0.0
            log.warning("store %s: usable again", self._database.path)
        self._core.tick(now)
        if now - self._measured >= MEASURE_S:
            self._measured = now
            self._measure()

    def _measure(self) -> None:
        wal = Path(f"{self._database.path}-wal")
        self._metrics = {
            **(self._core.ledger.stats() if self._core.ledger is not None else {}),
            "commits": self._database.commits,
            "rows": self._database.rows,
            "wal_bytes": wal.stat().st_size if wal.exists() else 0,
            "refused": self.counters(),
        }
        if self._newest is not None and self._core.ledger is not None:
            self._newest.take(self._core.ledger.state.reports)

    # -- requests -------------------------------------------------------------------------------------------

    def _stats(self, request: Request) -> Reply:
        self._check_file()
        self._core.ledger_for("stats", request.sender)
        self._measure()
        return Reply(self._metrics)

    def _serve(self, method: str, request: Request) -> Reply | Park:
        self._check_file()
        self._core.ledger_for(method, request.sender)
        kind = METHODS[method][0]
        body: Any = None if kind is None else request.decode(kind)
        wait_s = max(0.0, min(MAX_PARK_S, getattr(body, "wait_s", 0.0)))
        poll = partial(self._poll, method, body, request, time.monotonic() + wait_s)
        reply = poll()
        if reply is not None:
            return reply
        return Park(poll, wait_s + 1.0)  # the last poll answers "not yet" by itself

    def _poll(self, method: str, body: Any, request: Request, deadline: float) -> Reply | None:
        """The answer, or None for "not yet"; after the deadline what there is to say then."""
        self._check_file()
        now = time.monotonic()
        try:
            answer = self._core.handle(method, body, request.sender, now)
        except Refusal as refusal:
            if refusal.code in ("RETRY_AFTER", "HELD") and now < deadline:
                return None
            raise
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        not_yet = (
            (method == "claim" and answer is None)
            or (method == "reports" and not answer)
            or (method == "wait" and not answer.satisfied)
        )
        return None if not_yet and now < deadline else Reply(answer)

    def _only_launcher(self, request: Request) -> None:
        self._check_file()
        if request.sender.role != LAUNCHER:
            raise Refusal(
                "FORBIDDEN", f"{request.sender.role!r} may not {request.method}, only {LAUNCHER} may"
            )

    def _create(self, request: Request) -> Reply:
        self._only_launcher(request)
        try:
            self._core.create(request.decode(rec.RunParams), time.monotonic())
        except ConfigError as error:
            raise Refusal("WRONG_RUN", str(error)) from None
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        return Reply(self._database.params())

    def _trained(self, request: Request) -> Reply:
        self._core.ledger_for("trained", request.sender)
        self._barrier()  # what the file answers must include this turn
        try:
            return Reply(self._core.trained(request.decode(str)))
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def _backup(self, request: Request) -> Reply:
        self._only_launcher(request)
        self._core.ledger_for("backup", request.sender)
        self._barrier()
        try:
            self._database.backup(request.decode(str))
        except (ConfigError, sqlite3.Error) as error:
            raise Refusal("BACKUP_FAILED", str(error)) from None
        return Reply()


def check_metrics_port(port: int) -> None:
    """Raise ConfigError where run_store() could not serve metrics at the port: it is taken, or a package is missing."""
    _prometheus(port).check_port(port)


def _prometheus(port: int) -> ModuleType:
    try:
        from mgrpo.store import prometheus
    except ImportError:
        raise ConfigError(
            f'metrics port {port}: the endpoint needs the package prometheus-client (pip install "mgrpo[store]")'
        ) from None
    return prometheus


def run_store(
    url: str,
    db_path: str | Path,
    params: rec.RunParams | None = None,
    *,
    metrics_port: int | None = None,
    announce: Callable[[str], object] = log.info,
    **options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT; for a process of its own. Call from the main thread."""
    received: list[int] = []  # no Event: a handler that meets its lock held would wait for ever
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    with StoreServer(url, db_path, params, **options) as server, ExitStack() as stack:
        announce(f"store {db_path} serves at {server.url}")
        if metrics_port is not None:
            endpoint = _prometheus(metrics_port).MetricsEndpoint(
                server.metrics, metrics_port, newest=server.newest()
            )
            stack.callback(endpoint.close)
            announce(f"metrics at http://127.0.0.1:{endpoint.port}/metrics")
        while not received:
            server.check()
            time.sleep(0.2)
