"""The trajectory log: append-only files on a trainer's server that hold its role's trajectories until they are trained.

Rollout workers append over the link; an answer means that the bytes are on disk (one fdatasync for everything that
arrived together). A trajectory is identified by (run, query, rollout, role, invocation, attempt): the same again gets
the same reference, other content is a conflict. Reading gives numpy views of the bytes; token by token nothing ever
becomes a Python object.

After a crash a torn tail, if any, is cut: bytes at the end of the last segment that no whole record follows. Damage
anywhere else stays where it is and is logged with file and bytes; the records behind it are kept, and whoever reads a
damaged one gets a CorruptionError.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import google_crc32c

from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.files import sync_folder
from mgrpo.trajectory_log.format import (
    FORMAT,
    FRAME,
    HEAD,
    KIND,
    MAGIC,
    MAX_META,
    Append,
    LogRef,
    Meta,
    checked_payload,
    mapped,
    next_record,
    padding,
    parse_record,
    payload_offset,
    read_bytes,
    trajectory,
)
from mgrpo.transport.codec import Buffer, Refusal
from mgrpo.transport.server import Handler, Reply, Request
from mgrpo.types import Trajectory

log = logging.getLogger("mgrpo.trajectory_log")
SEGMENT_BYTES = 256 << 20

P = ParamSpec("P")
R = TypeVar("R")
Identity = tuple[str, int, int, int]  # query, rollout, invocation, attempt


def _locked(method: Callable[Concatenate[TrajectoryLog, P], R]) -> Callable[Concatenate[TrajectoryLog, P], R]:
    @functools.wraps(method)
    def holding(trajectory_log: TrajectoryLog, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with trajectory_log._lock:
            return method(trajectory_log, *args, **kwargs)

    return holding


class TrajectoryLog:
    """One role's trajectories in a folder. One process writes; `digest` is the run's. Thread-safe: a server
    appends and syncs while the trainer reads and truncates. Raises ConfigError when the folder cannot be used,
    CorruptionError for one that is not a trajectory log's."""

    def __init__(
        self, path: str | Path, *, role: str, digest: str, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.path, self.role, self.digest = Path(path), role, digest
        self._segment_bytes = segment_bytes
        self._lock = threading.RLock()
        self._index: dict[Identity, LogRef] = {}
        self._newest: dict[int, int] = {}  # segment -> highest group index in it
        self._fresh: list[Identity] = []  # appended since the last sync
        self._taken_back = False  # something that sync() has not yet confirmed is gone again
        self._segment = 0
        self._file = -1
        self._size = self._synced = 0
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)
            self._recover()
        except (OSError, Refusal) as error:
            raise ConfigError(f"trajectory log {self.path} cannot be used: {error}") from None

    @_locked
    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            with contextlib.suppress(Refusal):
                self.sync()
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> TrajectoryLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def segments(self) -> list[int]:
        return sorted(int(p.stem) for p in self.path.glob("*.segment"))

    def _name(self, segment: int) -> Path:
        return self.path / f"{segment:08d}.segment"

    # -- writing --------------------------------------------------------------------------------------------

    @_locked
    def append(self, meta: Meta, payload: Buffer) -> LogRef:
        """Add a record; it is durable after the next sync()."""
        identity = (meta.query, meta.rollout, meta.invocation, meta.attempt)
        encoded = meta.encoded()
        head = encoded + b"\0" * padding(len(encoded))
        crc = google_crc32c.extend(google_crc32c.value(head), bytes(payload))
        known = self._index.get(identity)
        if known is not None:
            if (known.crc, known.length) != (crc, len(payload)):
                raise Refusal(
                    "CONFLICT", f"trajectory {identity} of role {self.role!r} is known with other content"
                )
            return known
        if self._size >= self._segment_bytes:
            self._roll()
        offset = self._size
        record = b"".join((FRAME.pack(MAGIC, len(encoded), len(payload), crc, 0), head, payload))
        record += b"\0" * padding(len(record))
        written = 0
        try:
            while written < len(record):
                written += os.pwrite(self._file, memoryview(record)[written:], offset + written)
        except OSError as error:
            self._undo()
            raise Refusal("UNAVAILABLE", f"trajectory log {self.path}: {error}") from None
        self._size += len(record)
        ref = LogRef(self.role, self._segment, offset, len(payload), crc)
        self._index[identity] = ref
        self._fresh.append(identity)
        self._newest[self._segment] = max(self._newest.get(self._segment, 0), meta.index)
        return ref

    @_locked
    def sync(self) -> None:
        """Make everything appended since the last sync durable, or raise UNAVAILABLE and forget all of it."""
        taken_back, self._taken_back = self._taken_back, False
        if taken_back:
            raise Refusal("UNAVAILABLE", f"trajectory log {self.path}: what was appended could not be kept")
        try:
            self._flush()
        finally:
            self._taken_back = False

    def _flush(self) -> None:
        if not self._fresh:
            return
        try:
            os.fdatasync(self._file)
        except OSError as error:
            self._undo()
            raise Refusal("UNAVAILABLE", f"trajectory log {self.path}: {error}") from None
        self._synced = self._size
        self._fresh.clear()

    def _undo(self) -> None:
        """What is not known to be on disk is taken back: its senders will send it again."""
        for identity in self._fresh:
            self._index.pop(identity, None)
        self._taken_back = self._taken_back or bool(self._fresh)
        self._fresh.clear()
        self._size = self._synced
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._synced)

    def _roll(self) -> None:
        self._flush()
        before = self._file
        self._open(self._segment + 1)
        os.close(before)

    def _open(self, segment: int) -> None:
        path = self._name(segment)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(file).st_size
                if size < len(HEAD):
                    os.ftruncate(file, 0)
                    os.pwrite(file, HEAD, 0)
                    os.fsync(file)
                    sync_folder(self.path)
                    size = len(HEAD)
            except OSError:
                os.close(file)
                raise
        except OSError as error:
            raise Refusal("UNAVAILABLE", f"trajectory log {path}: {error}") from None
        self._file, self._segment, self._size, self._synced = file, segment, size, size

    @_locked
    def truncate(self, below: int) -> int:
        """Delete closed segments that hold only groups with an index below `below`; returns how many. Pass the cursor
        of the oldest checkpoint that a run may still go back to."""
        gone = [s for s in self.segments() if s != self._segment and self._newest.get(s, -1) < below]
        for segment in gone:
            self._name(segment).unlink()
            self._newest.pop(segment, None)
        if gone:
            sync_folder(self.path)
        dead = set(gone)
        if dead:
            self._index = {key: ref for key, ref in self._index.items() if ref.segment not in dead}
        return len(gone)

    # -- reading --------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        segments = self.segments()
        for segment in segments:
            path, is_last = self._name(segment), segment == segments[-1]
            size = path.stat().st_size
            end = self._scan(segment, is_last)
            if end < size and is_last:
                log.warning("%s: %d bytes behind the last whole record are cut", path, size - end)
                os.truncate(path, end)
            elif end < size:
                log.error("%s is damaged from byte %d to its end", path, end)
        self._open(segments[-1] if segments else 1)

    def _scan(self, segment: int, is_last: bool) -> int:
        """Index a segment's records; returns where the last whole one ends."""
        path = self._name(segment)
        view = mapped(path)
        if bytes(view[: len(HEAD)]) != HEAD:
            if is_last and len(view) < len(HEAD):
                return 0
            if bytes(view[: len(KIND)]) == KIND:
                theirs = bytes(view[len(KIND) : len(HEAD)]).partition(b"\n")[0].decode(errors="replace")
                raise CorruptionError(
                    f"{path} has format {theirs}, this program knows format {FORMAT.decode()}: go on with the mgrpo "
                    "that began the run"
                )
            raise CorruptionError(f"{path} is not a trajectory log segment")
        at = len(HEAD)
        while at < len(view):
            record = next_record(view, at)
            if record is None:
                return at
            start, (meta, crc, length, after) = record
            if start > at:
                log.error("%s is damaged from byte %d to %d; the records behind are kept", path, at, start)
            identity = (meta.query, meta.rollout, meta.invocation, meta.attempt)
            self._index[identity] = LogRef(self.role, segment, start, length, crc)
            self._newest[segment] = max(self._newest.get(segment, 0), meta.index)
            at = after
        return len(view)

    def read(self, ref: LogRef) -> Trajectory:
        """The trajectory at `ref`; its arrays are read-only, aligned views of the bytes read. Raises CorruptionError
        naming file and byte."""
        path = self._name(ref.segment)
        if ref.role != self.role:
            raise ValueError(f"reference into the trajectory log of {ref.role!r}, this one is {self.role!r}")
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(ref.offset)
                head = file.read(FRAME.size)
                meta_length = FRAME.unpack(head)[1] if len(head) == FRAME.size else 0
                payload = payload_offset(min(meta_length, MAX_META))
                file.seek(ref.offset)
                record = read_bytes(file, payload + ref.length)
        except OSError as error:
            raise CorruptionError(f"{path}: {error}") from None
        found = parse_record(record, 0)
        if found is None or found[1] != ref.crc or found[2] != ref.length:
            raise CorruptionError(f"{path}: no valid record at byte {ref.offset}")
        return trajectory(found[0], record[payload : payload + ref.length])

    # -- serving --------------------------------------------------------------------------------------------

    def handlers(self) -> dict[str, Handler]:
        """For a Server with barrier=self.sync."""
        return {"append": self._serve_append}

    def _serve_append(self, request: Request) -> Reply:
        if request.sender.run != self.digest:
            raise Refusal(
                "WRONG_RUN", f"run digest {request.sender.run!r}, this trajectory log serves {self.digest!r}"
            )
        if request.sender.role != "worker":
            raise Refusal("FORBIDDEN", f"{request.sender.role!r} may not append, only a worker may")
        body = request.decode(Append)
        if body.meta.role != self.role:
            raise Refusal(
                "FORBIDDEN",
                f"trajectory of role {body.meta.role!r}, this is the trajectory log of {self.role!r}",
            )
        return Reply(self.append(body.meta, checked_payload(body, request.frames)))
