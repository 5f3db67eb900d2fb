"""SQLite under the ledger: one exclusive connection, WAL, synchronous=FULL, many requests in one commit.

Database writes rows and reads them back; it knows no rules. `commit` is the moment of durability: one
transaction, one fsync. Checkpoints of the WAL happen only here, under an advisory lock that `inspect` shares
while it copies the file (see inspect.py), because an exclusive connection admits no reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.files import sync_folder
from mgrpo.store.records import Control, RunParams
from mgrpo.store.state import (
    APPLIED,
    COMMITTED,
    KEEP_REPORTS,
    LEASED,
    LOST,
    OPEN,
    READY,
    SURPLUS,
    Row,
    State,
)
from mgrpo.transport import codec

APPLICATION_ID = 0x6D677270  # "mgrp"
WAL_PAGES = 4096  # checkpoint beyond 16 MiB of WAL

MIGRATIONS = (  # forward only; user_version is how many have run
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE groups (query TEXT PRIMARY KEY, idx INTEGER NOT NULL UNIQUE, state TEXT NOT NULL, body BLOB
    NOT NULL); CREATE TABLE rollouts (query TEXT NOT NULL, rollout INTEGER NOT NULL, kind TEXT NOT NULL, body
    BLOB NOT NULL,
        PRIMARY KEY (query, rollout)) WITHOUT ROWID;
    CREATE TABLE invocations (query TEXT NOT NULL, rollout INTEGER NOT NULL, attempt INTEGER NOT NULL,
        role TEXT NOT NULL, invocation INTEGER NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (query, rollout, attempt, role, invocation)) WITHOUT ROWID;
    CREATE TABLE deliveries (role TEXT NOT NULL, query TEXT NOT NULL, idx INTEGER NOT NULL, state TEXT NOT
    NULL,
        epoch INTEGER NOT NULL, step INTEGER NOT NULL, failures INTEGER NOT NULL, reason TEXT NOT NULL,
        lease INTEGER NOT NULL, PRIMARY KEY (role, query)) WITHOUT ROWID;
    CREATE INDEX deliveries_by_state ON deliveries (role, state, step);
    CREATE INDEX deliveries_by_query ON deliveries (query);
    CREATE TABLE roles (role TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE reports (seq INTEGER PRIMARY KEY, source TEXT NOT NULL, n INTEGER NOT NULL, kind TEXT NOT
    NULL,
        body BLOB NOT NULL);
    """,
)
SERVED_HERE: set[Path] = set()  # files that this process holds open
_COLUMNS = {
    "meta": 2,
    "groups": 4,
    "rollouts": 4,
    "invocations": 6,
    "deliveries": 9,
    "roles": 2,
    "reports": 5,
}


class Connection(Protocol):
    """What Database needs of a connection (that of the sqlite3 module, in autocommit mode)."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Any: ...
    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> Any: ...
    def close(self) -> None: ...


def connect_sqlite(path: str) -> Connection:
    """The usual connection. isolation_level None: transactions are begun and ended by Database alone."""
    return sqlite3.connect(path, timeout=0.2, isolation_level=None, check_same_thread=False)


class Database:
    """The database file at `path`. Raises ConfigError when it is in use, is not a store, or is too new."""

    def __init__(
        self,
        path: str | Path,
        *,
        connect: Callable[[str], Connection] = connect_sqlite,
        synchronous: str = "FULL",
    ) -> None:
        self.path = Path(path)
        self._connect, self._synchronous = connect, synchronous
        self.commits = 0
        self.rows = 0
        self._db = self._open()
        SERVED_HERE.add(self.path.resolve())
        self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _open(self) -> Connection:
        try:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
                sync_folder(self.path.parent)
            db = self._connect(str(self.path))
        except (OSError, sqlite3.OperationalError) as error:
            raise ConfigError(f"store {self.path}: {_words(error)}") from None
        try:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            db.execute(f"PRAGMA synchronous={self._synchronous}")
            db.execute("PRAGMA wal_autocheckpoint=0")
            db.execute("PRAGMA cache_size=-32768")
            if mode != "wal":
                raise ConfigError(f"store {self.path}: journal mode is {mode!r}, WAL is not possible there")
            db.execute("BEGIN EXCLUSIVE")  # takes the lock now, and keeps it: locking_mode
            self._migrate(db)
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            db.close()
            if "locked" in str(error):
                raise ConfigError(f"store {self.path} is in use by another process") from None
            raise ConfigError(f"store {self.path}: {error}") from None
        except sqlite3.DatabaseError as error:
            db.close()
            raise CorruptionError(f"store {self.path}: {error}") from None
        except BaseException:
            db.close()
            raise
        return db

    def _migrate(self, db: Connection) -> None:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if application != APPLICATION_ID and not (empty and application == 0):
            raise ConfigError(
                f"{self.path} is a database of something else (application id {application:#x})"
            )
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"store {self.path} has format {version}, this program knows up to {len(MIGRATIONS)}"
            )
        for number in range(version, len(MIGRATIONS)):
            for statement in MIGRATIONS[number].split(";"):
                if statement.strip():
                    db.execute(statement)
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    # -- writing --------------------------------------------------------------------------------------------

    def commit(self, dirty: Mapping[str, Sequence[Row]]) -> None:
        """Make the rows durable, all or none. Raises sqlite3.Error; then none is."""
        if not dirty:
            return
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            for table, rows in dirty.items():
                marks = ",".join("?" * _COLUMNS[table])
                db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", rows)
                self.rows += len(rows)
            if "reports" in dirty:
                last = dirty["reports"][-1][0]
                db.execute("DELETE FROM reports WHERE seq <= ?", (last - KEEP_REPORTS,))
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        self.commits += 1
        if self.commits % 64 == 0:
            self.checkpoint(WAL_PAGES)

    def checkpoint(self, beyond_pages: int = 0) -> bool:
        """Move the WAL into the file when it has grown beyond so many pages and nobody is copying the file."""
        wal = Path(f"{self.path}-wal")
        if not wal.exists() or wal.stat().st_size <= beyond_pages * 4096:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return True

    def reopen(self) -> None:
        """Forget the connection, after an error that left it in an unknown state, and open the file again."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        self._db = self._open()

    def backup(self, target: str | Path) -> None:
        """Write a consistent copy to a new file."""
        target = Path(target)
        if target.exists():
            raise ConfigError(f"backup target {target} exists")
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.unlink(missing_ok=True)
            self._db.execute("VACUUM INTO ?", (str(partial),))
            partial.chmod(0o600)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.rename(target)
            sync_folder(target.parent)
        except (OSError, sqlite3.Error) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ConfigError(f"no backup was written to {target}: {_words(error)}") from None

    def close(self) -> None:
        """Checkpoint and close. Idempotent."""
        if self._lock >= 0:
            with contextlib.suppress(sqlite3.Error):
                self.checkpoint()
            self._db.close()
            SERVED_HERE.discard(self.path.resolve())
            os.close(self._lock)
            self._lock = -1

    # -- reading --------------------------------------------------------------------------------------------

    def params(self) -> RunParams | None:
        """The run this store was created for."""
        row = self._db.execute("SELECT value FROM meta WHERE key = 'params'").fetchone()
        return None if row is None else codec.decode(row[0], RunParams)

    def load(self, now: float) -> State | None:
        """The state as of the last commit: every group that is not settled, and all counts."""
        params = self.params()
        if params is None:
            return None
        db, state = self._db, State(params)
        for role, body in db.execute("SELECT role, body FROM roles"):
            state.load_role(role, body)
        for query, index, group_state in db.execute("SELECT query, idx, state FROM groups ORDER BY idx"):
            state.indices[index] = query
            state.next_index = index + 1
            state.sealed += group_state == "sealed"
            if group_state == "dropped":
                state.drop(index)
        for mark in LOST:
            for role, index in db.execute(
                "SELECT role, idx FROM deliveries WHERE state = ?", (mark,)
            ).fetchall():
                if role in state.roles:
                    state.roles[role].lost(mark).append(index)
        for held in state.roles.values():
            held.skipped.sort()
            held.surplus.sort()
        row = db.execute("SELECT value FROM meta WHERE key = 'control'").fetchone()
        if row is not None:
            state.control = codec.decode(row[0], Control)
        row = db.execute("SELECT value FROM meta WHERE key = 'workers'").fetchone()
        if row is not None:
            state.workers = dict.fromkeys(codec.decode(row[0], list[str]), now)
        for report in db.execute("SELECT seq, source, n, kind, body FROM reports ORDER BY seq").fetchall():
            state.load_report(report)
        alive = db.execute(
            "SELECT query FROM groups WHERE state = ? "
            "UNION SELECT query FROM deliveries WHERE state IN (?, ?, ?)",
            (OPEN, READY, LEASED, APPLIED),
        ).fetchall()
        for held in state.roles.values():  # what a rollback to the last checkpoint would bring back
            alive += db.execute(
                "SELECT query FROM deliveries WHERE role = ? AND state = ? AND step > ?",
                (held.name, SURPLUS, held.checkpoint_step),
            ).fetchall()
        for query in dict.fromkeys(query for (query,) in alive):
            self.load_group(state, query, now)
        return state

    def load_group(self, state: State, query: str, now: float) -> bool:
        """Bring one group into memory; False when there is none of that name."""
        db = self._db
        row = db.execute("SELECT query, idx, state, body FROM groups WHERE query = ?", (query,)).fetchone()
        if row is None:
            return False
        state.load_group(
            row,
            db.execute("SELECT * FROM rollouts WHERE query = ?", (query,)).fetchall(),
            db.execute("SELECT * FROM invocations WHERE query = ?", (query,)).fetchall(),
            db.execute("SELECT * FROM deliveries WHERE query = ?", (query,)).fetchall(),
            now,
        )
        return True

    def beyond(self, role: str, step: int) -> list[str]:
        """Groups of `role` that were committed at a later step, or set aside."""
        sql = "SELECT query FROM deliveries WHERE role = ? AND state IN (?, ?) AND step > ?"
        return [query for (query,) in self._db.execute(sql, (role, COMMITTED, SURPLUS, step)).fetchall()]

    def trained(self, role: str) -> list[Row]:
        """(role, step, query, index, state) of everything in the role's surviving optimizer history, in order."""
        sql = (
            "SELECT role, step, query, idx, state FROM deliveries "
            "WHERE role = ? AND state IN (?, ?) ORDER BY step, idx"
        )
        rows: list[Row] = self._db.execute(sql, (role, APPLIED, COMMITTED)).fetchall()
        return rows


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
