"""Power cuts, simulated below SQLite: a VFS that records every write, truncation and sync of every file.

From the record the disk of any moment can be rebuilt as a cut would leave it: what was synced is there, and
of what was not, an arbitrary choice of 512-byte sectors. kill -9 cannot show this: the page cache survives
it.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from mgrpo.errors import CorruptionError
from mgrpo.store import records as rec
from mgrpo.store.core import Core
from mgrpo.store.database import Database
from mgrpo.transport.codec import Sender, encode
from tests.ledger_machine import invocation
from tests.store_kit import DIGEST, run_params

SECTOR = 512
Event = tuple[str, str, Any]  # (what, file, details)


class Tape:
    """What happened to the files, in order, and the moments at which a record was acknowledged."""

    def __init__(self, obeys_sync: bool = True) -> None:
        self.events: list[Event] = []
        self.obeys_sync = obeys_sync
        self.vfs = _Recorder(self)

    def connect(self, path: str) -> Any:
        return _Connection(path, self.vfs.name)


class _Recorder(apsw.VFS):
    count = 0

    def __init__(self, tape: Tape) -> None:
        _Recorder.count += 1
        self.name = f"tape{_Recorder.count}"
        self.tape = tape
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _File(self, name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:
        self.tape.events.append(("delete", Path(name).name, None))
        super().xDelete(name, sync_directory)


class _File(apsw.VFSFile):
    def __init__(self, vfs: _Recorder, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.tape = vfs.tape
        self.name = Path(name.filename() if isinstance(name, apsw.URIFilename) else str(name)).name

    def xWrite(self, data: bytes, offset: int) -> None:
        self.tape.events.append(("write", self.name, (offset, bytes(data))))
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:
        self.tape.events.append(("truncate", self.name, size))
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        if self.tape.obeys_sync:
            self.tape.events.append(("sync", self.name, None))
            super().xSync(flags)


class _Connection:
    """apsw with the sqlite3 module's errors, as the engine expects them."""

    def __init__(self, path: str, vfs: str) -> None:
        self._db = apsw.Connection(path, vfs=vfs)

    def execute(self, sql: str, parameters: Any = ()) -> Any:
        try:
            return self._db.execute(sql, parameters)
        except apsw.Error as error:
            raise sqlite3.OperationalError(str(error)) from error

    def executemany(self, sql: str, rows: Any) -> Any:
        try:
            return self._db.executemany(sql, rows)
        except apsw.Error as error:
            raise sqlite3.OperationalError(str(error)) from error

    def close(self) -> None:
        self._db.close()


@dataclass
class _Disk:
    """One file: what is safe, and what a cut may or may not keep."""

    safe: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)
    exists: bool = False

    def sync(self) -> None:
        for event in self.pending:
            _apply(self.safe, event)
        self.pending.clear()
        self.exists = True

    def after_cut(self, rng: random.Random) -> bytes | None:
        if not self.exists and rng.random() < 0.5:
            return None
        left = bytearray(self.safe)
        keep = rng.choice([0.0, 0.5, 0.9, 1.0])
        for what, name, details in self.pending:
            if what == "write":
                offset, data = details
                for at in range(0, len(data), SECTOR):
                    if rng.random() < keep:
                        _apply(left, ("write", name, (offset + at, data[at : at + SECTOR])))
            elif rng.random() < keep:
                _apply(left, (what, name, details))
        return bytes(left)


def _apply(content: bytearray, event: Event) -> None:
    what, _, details = event
    if what == "truncate":
        del content[details:]
    else:
        offset, data = details
        if len(content) < offset:
            content += b"\0" * (offset - len(content))
        content[offset : offset + len(data)] = data


def work(folder: Path, seed: int, groups: int, synchronous: str, obeys_sync: bool) -> Tape:
    """Run a store through `groups` groups, with WAL checkpoints on the way, and record everything."""
    rng = random.Random(seed)
    tape = Tape(obeys_sync)
    database = Database(folder / "s.db", connect=tape.connect, synchronous=synchronous)
    core = Core(database, 0.0)
    core.create(run_params(max_lag=10_000), 0.0)
    worker = Sender(DIGEST, "worker", "w", "s")
    for role in ("main", "sub"):
        trainer = Sender(DIGEST, f"trainer:{role}", role, "s")
        core.handle("resume", rec.Resume(role, -1, "n", 0), trainer, 0.0)
        core.handle("status", rec.Status(role, 1, 0, -1, -1), trainer, 0.0)
    unacked: list[tuple[str, tuple[Any, ...], bytes]] = []
    for number in range(groups):
        query = f"q{number}"
        core.handle(
            "open_group", rec.OpenGroup(query, 2, {}, number, {"text": "x" * rng.randrange(200)}), worker, 0.0
        )
        for rollout in range(2):
            done = invocation(query, rollout, 0, "main", 0)
            final = rec.RolloutFinal(query, rollout, 0, rng.random(), 1.0, {"sub": 0}, {}, 0, 0)
            core.handle("invocation_done", done, worker, 0.0)
            core.handle("rollout_final", final, worker, 0.0)
            unacked.append(("rollouts", (query, rollout), encode(final)))
            if rng.random() < 0.6:  # several records in one commit
                core.commit()
                tape.events.append(("ack", "", list(unacked)))
                unacked.clear()
        if number % 7 == 3:
            database.checkpoint()
    database._db.close()
    return tape


@dataclass
class Verdict:
    cuts: int = 0
    acked: int = 0
    lost: int = 0
    corrupt: int = 0


def cuts(tape: Tape, folder: Path, n: int, seed: int) -> Verdict:
    """Cut the power at n moments, start the store from what is left, and count what is missing."""
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(len(tape.events)), min(n, len(tape.events))))
    moments += sorted(rng.choices(range(len(tape.events)), k=n - len(moments)))
    moments.sort()
    verdict = Verdict()
    disks: dict[str, _Disk] = {}
    acked: list[tuple[str, tuple[Any, ...], bytes]] = []
    for at, event in enumerate([*tape.events, ("end", "", None)]):
        while moments and moments[0] == at:
            moments.pop(0)
            _judge(disks, acked, folder / f"cut{verdict.cuts}", rng, verdict)
        what, name, details = event
        if what == "ack":
            acked += details
        elif what == "sync":
            disks[name].sync()
        elif what == "delete":
            disks.pop(name, None)
        elif what != "end":
            disks.setdefault(name, _Disk()).pending.append(event)
    return verdict


def _judge(
    disks: dict[str, _Disk], acked: list[Any], folder: Path, rng: random.Random, verdict: Verdict
) -> None:
    folder.mkdir()
    for name, disk in disks.items():
        left = disk.after_cut(rng)
        if left is not None:
            (folder / name).write_bytes(left)
    verdict.cuts += 1
    verdict.acked += len(acked)
    try:
        database = Database(folder / "s.db")
        healthy = database._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        Core(database, 0.0)
        present = {("rollouts", (q, r)): b for q, r, b in _rollouts(database)}
        database.close()
    except (CorruptionError, sqlite3.Error):
        verdict.corrupt += 1
        return
    verdict.corrupt += not healthy
    verdict.lost += sum(present.get((table, key)) != body for table, key, body in acked)


def _rollouts(database: Database) -> Iterator[Any]:
    return iter(database._db.execute("SELECT query, rollout, body FROM rollouts").fetchall())
