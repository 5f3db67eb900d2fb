"""A recording of what services answered, so that a run can be repeated without them.

    off      nothing is recorded
    record   every request goes out once, and its answer takes the place of an earlier recording's
    cached   what is recorded is answered from the recording; the rest goes out and is recorded
    replay   nothing goes out: a request that is not recorded ends the run (ServiceError)

One SQLite file, shared by the worker processes of a run. The key of an answer is the service, the request as canonical
JSON (keys sorted; no headers, so no keys of services) and, for a request whose answer is not a function of it alone,
its occurrence: a text that names the one time it is made, e.g. rollout, turn and number. Without one its occurrences
are numbered in the order of this process, which is the same again only where they come one after the other. Same
requests that are under way at once are made once. Failures are never recorded; statuses that are the policy's matter
(ServiceAnswer) are.

A recording holds one answer a key, and a service that is said to be pure may answer differently all the same (a model
that judges does). So that a recorded run can be repeated, nobody gets an answer to a pure request that the recording
does not keep: "cached" gives what was written first, whichever worker wrote it; "record" asks again only in another
process, which leaves a run of one worker that was not interrupted repeatable.

Of a request only its hash is kept, so that the file holds no question of a benchmark whose rows must not be written
down; what the services said of it is there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mgrpo.errors import ConfigError, ServiceError
from mgrpo.services.failures import ServiceAnswer, ServiceFailure
from mgrpo.services.failures import Source as Source
from mgrpo.services.outage import Joint
from mgrpo.waiting import wait_until

Mode = Literal["off", "record", "cached", "replay"]
FORMAT = 1  # user_version of the file
APPLICATION = 0x6D677263  # application_id of the file: "mgrc"
BUSY_SECONDS = 30.0  # that one process waits for another's write
SHOWN = 300  # characters of a request in an error
TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,   -- SHA-256 of service, request and occurrence
    service TEXT NOT NULL,
    status INTEGER,         -- of a ServiceAnswer; NULL for a value
    answer TEXT NOT NULL    -- JSON: the value, or the words of the ServiceAnswer
) WITHOUT ROWID
"""
READ = "SELECT status, answer FROM answers WHERE key = ?"
_Row = tuple[int | None, str]


@dataclass(slots=True)
class _Flight:
    """A call that is under way."""

    text: asyncio.Future[str]  # JSON: each who waits reads a value of its own from it
    joint: Joint = field(default_factory=Joint)


class Cassette:
    """Use through() from one event loop. The file is opened at the first use; close() closes it."""

    def __init__(self, path: str | Path, mode: Mode) -> None:
        """Raises ConfigError for a mode that is none, a folder that is not there, and a replay of no file."""
        self.path, self.mode = Path(path), mode
        if mode not in get_args(Mode):
            raise ConfigError(f"cassette mode {mode!r}: expected one of {', '.join(get_args(Mode))}")
        if mode == "replay" and not self.path.is_file():
            raise ConfigError(f"cassette {self.path}: there is no such file to replay")
        if mode != "off" and not self.path.parent.is_dir():
            raise ConfigError(f"cassette {self.path}: its folder does not exist")
        self._database: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._numbers: Counter[str] = Counter()  # occurrences of requests that are not pure and name none
        self._settled: set[bytes] = set()  # keys, cut, of pure requests that "record" has asked anew

    async def through(
        self,
        service: str,
        request: Mapping[str, object],
        call: Callable[[], Awaitable[object]],
        *,
        pure: bool = True,
        occurrence: str = "",
    ) -> tuple[Any, Source]:
        """The answer to a request, and where it came from: a JSON value of call() or of the recording.

        pure: the answer is a function of the request alone. occurrence: what else names it, where it is not. Raises
        what call() raises, the ServiceAnswer that was recorded, ServiceError for a replay of what was not, and
        ConfigError for a file that is no cassette.
        """
        if self.mode == "off":
            return await call(), "live"
        text = canonical(request)
        if pure:
            occurrence = ""
        elif not occurrence:
            self._numbers[f"{service}\0{text}"] += 1
            occurrence = f"#{self._numbers[f'{service}{chr(0)}{text}']}"
        digest = hashlib.sha256(encoded(f"{service}\0{text}\0{occurrence}"))
        key, short = digest.hexdigest(), digest.digest()[:16]
        while (flight := self._flights.get(key)) is not None:
            with flight.joint.following():
                await asyncio.wait([flight.text])
            if not flight.text.cancelled():  # else its rollout has ended, and the next of us calls
                if error := flight.text.exception():
                    raise _again(error) from error
                return json.loads(flight.text.result()), "cache"
        if (self.mode != "record" or short in self._settled) and (row := self._read(key)) is not None:
            return _value(*row, self._recorded), self._recorded
        if self.mode == "replay":
            which = f" as occurrence {occurrence}" if occurrence else ""
            raise ServiceError(
                f"cassette {self.path} holds no answer of service {service!r}{which} to {text[:SHOWN]}"
            )
        row = await self._call(key, service, call)
        if pure and self.mode == "record":
            self._settled.add(short)
        return _value(*row, "live"), "live"

    async def _call(self, key: str, service: str, call: Callable[[], Awaitable[object]]) -> _Row:
        """call() on behalf of all who ask for the same; what it says is recorded, and given as the recording has it."""
        flight = self._flights[key] = _Flight(asyncio.get_running_loop().create_future())
        try:
            with flight.joint.leading():
                try:
                    said: _Row = (None, json.dumps(await call(), allow_nan=False))
                except ServiceAnswer as answer:
                    said = (answer.status, json.dumps(answer.words))
            row = self._write(key, service, *said)
            if row[0] is None:
                flight.text.set_result(row[1])
            else:
                _fail(flight.text, ServiceAnswer(row[0], json.loads(row[1])))
            return row
        except Exception as error:
            _fail(flight.text, error)
            raise
        finally:
            flight.text.cancel()  # where nothing came of it
            del self._flights[key]

    def digest(self) -> str:
        """SHA-256 of everything recorded, in hexadecimal; the same for the same answers, in whatever order they
        came."""
        total = hashlib.sha256()
        with self._lock:
            rows = self._open().execute("SELECT key, status, answer FROM answers ORDER BY key")
            for key, status, answer in rows:
                total.update(encoded(f"{key} {status} {answer}\n"))
        return total.hexdigest()

    def __len__(self) -> int:
        with self._lock:
            return int(self._open().execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Idempotent; the next use opens the file again."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    # -- the file ------------------------------------------------------------------------------------------------------

    def _read(self, key: str) -> _Row | None:
        with self._lock:
            row: _Row | None = self._open().execute(READ, (key,)).fetchone()
        return row

    @property
    def _recorded(self) -> Source:
        """Where an answer of the file comes from."""
        return "replay" if self.mode == "replay" else "cache"

    def _write(self, key: str, service: str, status: int | None, answer: str) -> _Row:
        """What the recording has of the key afterwards: in "cached" the first that anybody wrote."""
        verb = "INSERT OR REPLACE" if self.mode == "record" else "INSERT OR IGNORE"
        with self._lock:
            try:
                self._open().execute(
                    f"{verb} INTO answers VALUES (?, ?, ?, ?)", (key, service, status, answer)
                )
                kept: _Row = self._open().execute(READ, (key,)).fetchone()
            except sqlite3.Error as error:
                raise ServiceError(f"cassette {self.path}: cannot be written: {error}") from error
        return kept

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            try:
                self._database = _opened(self.path, read_only=self.mode == "replay")
            except sqlite3.Error as error:
                raise ConfigError(f"cassette {self.path}: {error}") from error
        return self._database


def canonical(request: Mapping[str, object]) -> str:
    """Keys sorted, no spaces. Raises ValueError for what is no JSON."""
    try:
        return json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a request that is no JSON: {error}") from None


def encoded(text: str) -> bytes:
    """As UTF-8; lone surrogates are kept apart."""
    return text.encode("utf-8", "surrogatepass")


def _value(status: int | None, answer: str, source: Source) -> Any:
    """Of a row. Raises the ServiceAnswer that was recorded."""
    value = json.loads(answer)
    if status is not None:
        raise ServiceAnswer(status, value, source)
    return value


def _fail(flight: asyncio.Future[str], error: Exception) -> None:
    flight.set_exception(error)
    flight.exception()  # retrieved: there may be nobody else who asks


def _again(error: BaseException) -> BaseException:
    """The same failure for another rollout, with a traceback of its own."""
    if isinstance(error, ServiceAnswer):
        return ServiceAnswer(error.status, error.words, "cache")
    return ServiceFailure(*error.args) if isinstance(error, ServiceFailure) else error


def _opened(path: Path, *, read_only: bool) -> sqlite3.Connection:
    uri = path.absolute().as_uri()
    if read_only:  # a folder that may not be written to has no place for the log of a file in WAL mode
        uri += "?mode=ro" if os.access(path.parent, os.W_OK) else "?immutable=1"
    database = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        database.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")  # other workers open it now, too
        is_empty = not database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if is_empty and not read_only:
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {FORMAT}")
            database.execute(TABLE)
        known = [
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        ]
        if known != [APPLICATION, FORMAT]:
            raise ConfigError(f"cassette {path}: the file is no cassette of format {FORMAT}")
        database.execute("COMMIT")
        if not read_only:
            wait_until(lambda: _set_wal(database), BUSY_SECONDS, lambda: f"cassette {path}: is locked")
            database.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        database.close()
        raise
    return database


def _set_wal(database: sqlite3.Connection) -> bool:
    """False while another process has the file in hand: SQLite itself does not wait with this."""
    try:
        return bool(database.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal")
    except sqlite3.OperationalError:
        return False
