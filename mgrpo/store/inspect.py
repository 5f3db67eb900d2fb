"""Looking at a store's file, also while a server uses it.

The server's connection is exclusive, so nobody else may open the file. What is read here is a copy: the
database moves its WAL into the file only under a lock that is shared while copying, so file and WAL always
belong together; a torn last frame of the WAL is cut by SQLite itself. Nothing is ever written beside or into
the original.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.store.database import APPLICATION_ID, SERVED_HERE
from mgrpo.store.records import RunParams
from mgrpo.store.state import RoleBody
from mgrpo.transport import codec

LIST = 20  # groups named per list


@dataclass
class Inspection:
    """What `mgrpo store inspect` shows. Groups are (index, query); the lists hold the oldest LIST of each."""

    run: RunParams
    groups: dict[str, int] = field(default_factory=dict)  # state -> count
    oldest_open: list[tuple[int, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    deliveries: dict[str, dict[str, int]] = field(default_factory=dict)  # role -> state -> count
    roles: dict[str, RoleBody] = field(default_factory=dict)
    stuck: list[tuple[str, int, str]] = field(default_factory=list)  # leased while later groups are trained
    quarantined: list[tuple[str, int, str, str]] = field(default_factory=list)  # role, index, query, reason
    workers: list[str] = field(default_factory=list)  # alive when the store last looked

    def lines(self) -> Iterator[str]:
        """For people."""
        run = self.run
        yield f"run {run.run!r}, digest {run.digest}"
        pool = f", chosen from {run.pool}" if run.claim_size() > run.batch else ""
        window = f", claim_window {run.claim_window}" if run.claim_window > 1 else ""
        yield f"{run.batch} groups of {run.k} rollouts a step{pool}, max_lag {run.max_lag}{window}"
        yield f"workers: {', '.join(self.workers) or 'none'}"
        yield "groups: " + (", ".join(f"{n} {state}" for state, n in sorted(self.groups.items())) or "none")
        for index, query in self.oldest_open:
            yield f"  open     {index:>6} {query}"
        for index, query in self.dropped:
            yield f"  dropped  {index:>6} {query}"
        for name, states in sorted(self.deliveries.items()):
            counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
            yield f"role {name}: {counts or 'nothing yet'}"
        for name, body in sorted(self.roles.items()):
            yield (
                f"role {name}: epoch {body.epoch}, version {body.version}, step {body.step}, "
                f"checkpoint {body.checkpoint_step}"
            )
        for name, index, query in self.stuck:
            yield f"  stuck lease of {name}: {index} {query}"
        for name, index, query, reason in self.quarantined:
            yield f"  quarantined for {name}: {index} {query}: {reason}"


def inspect(path: str | Path) -> Inspection:
    """Read a store's file, live or not. Raises ConfigError when it is no store, CorruptionError when damaged."""
    with snapshot(path) as copy, closing(sqlite3.connect(copy)) as db:
        try:
            return _read(db, Path(path))
        except sqlite3.DatabaseError as error:
            raise CorruptionError(f"store {path}: {error}") from None


@contextmanager
def snapshot(path: str | Path) -> Iterator[Path]:
    """A consistent private copy of the store's file, gone afterwards."""
    path = Path(path)
    if path.resolve() in SERVED_HERE:
        # closing any descriptor of a file drops the POSIX locks that this process holds on it, SQLite's included
        raise ConfigError(f"store {path} is served by this very process: ask it for its stats")
    if not path.is_file():
        raise ConfigError(f"no store at {path}")
    with tempfile.TemporaryDirectory(prefix="mgrpo-inspect-") as folder:
        copy = Path(folder) / "store.db"
        with _no_checkpoint(Path(f"{path}.lock")):
            shutil.copyfile(path, copy)
            wal = Path(f"{path}-wal")
            if wal.exists():
                shutil.copyfile(wal, f"{copy}-wal")
        yield copy


@contextmanager
def _no_checkpoint(lock: Path) -> Iterator[None]:
    """Keep the database from moving its WAL; without a lock file no store has ever had this file open."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _read(db: sqlite3.Connection, path: Path) -> Inspection:
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise ConfigError(f"{path} is not a store")
    row = db.execute("SELECT value FROM meta WHERE key = 'params'").fetchone()
    if row is None:
        raise ConfigError(f"store {path} holds no run yet")
    found = Inspection(codec.decode(row[0], RunParams))
    row = db.execute("SELECT value FROM meta WHERE key = 'workers'").fetchone()
    found.workers = [] if row is None else codec.decode(row[0], list[str])
    found.groups = dict(db.execute("SELECT state, count(*) FROM groups GROUP BY state"))
    listing = "SELECT idx, query FROM groups WHERE state = ? ORDER BY idx LIMIT ?"
    found.oldest_open = db.execute(listing, ("open", LIST)).fetchall()
    found.dropped = db.execute(listing, ("dropped", LIST)).fetchall()
    for role, state, n in db.execute("SELECT role, state, count(*) FROM deliveries GROUP BY role, state"):
        found.deliveries.setdefault(role, {})[state] = n
    for role, body in db.execute("SELECT role, body FROM roles"):
        found.roles[role] = codec.decode(body, RoleBody)
    found.stuck = db.execute(
        "SELECT role, idx, query FROM deliveries AS held WHERE state = 'leased' AND idx < "
        "(SELECT max(idx) FROM deliveries WHERE role = held.role AND state IN ('applied', 'committed')) "
        "ORDER BY idx LIMIT ?",
        (LIST,),
    ).fetchall()
    found.quarantined = db.execute(
        "SELECT role, idx, query, reason FROM deliveries WHERE state = 'quarantined' ORDER BY idx LIMIT ?",
        (LIST,),
    ).fetchall()
    return found
