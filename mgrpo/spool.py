"""The spool: append-only files on a trainer's server that hold its role's trajectories until they are
trained.

    segment = 16-byte head, then records
    record  = magic u32 | meta length u32 | payload length u64 | crc32c u32 | 0 u32 | meta | payload
    payload = tokens i32[n] | logprobs f32[n] | versions i32[n] | loss_mask u8[n], little-endian

Record, meta and payload each begin at a multiple of 8 bytes, so the arrays are aligned in the file and in what is read.

Rollout workers append over the link; an answer means that the bytes are on disk (one fdatasync for everything
that arrived together). A trajectory is identified by (run, query, rollout, role, invocation, attempt): the
same again gets the same reference, other content is a conflict. Reading gives numpy views of the bytes; token
by token nothing ever becomes a Python object.

After a crash a torn tail, if any, is cut: bytes at the end of the last segment that no whole record follows. Damage
anywhere else stays where it is and is logged with file and bytes; the records behind it are kept, and whoever reads a
damaged one gets a CorruptionError.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.files import sync_folder
from mgrpo.transport import codec
from mgrpo.transport.client import Answer, Client
from mgrpo.transport.codec import (
    ArraySpec,
    BadMessage,
    Buffer,
    Count,
    Name,
    Record,
    Refusal,
    Scores,
    Sender,
    Small,
)
from mgrpo.transport.server import Handler, Reply, Request
from mgrpo.types import Trajectory

log = logging.getLogger("mgrpo.spool")
_KIND = b"mgrpo spool "
HEAD = _KIND + b"2\n\0\0"
_FRAME = struct.Struct("<IIQII")
_MAGIC = 0x50534D47
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
MAX_META = 1 << 20  # bytes
SEGMENT_BYTES = 256 << 20
_ARRAYS = {"tokens": "<i4", "logprobs": "<f4", "versions": "<i4", "loss_mask": "|u1"}
_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in _ARRAYS.items()}
PER_TOKEN = sum(_BYTES.values())

P = ParamSpec("P")
R = TypeVar("R")
Identity = tuple[str, int, int, int]  # query, rollout, invocation, attempt


class SpoolRef(Record):
    """Where a trajectory lies: segment and byte offset in its role's spool, payload length and crc32c."""

    role: Name
    segment: Count
    offset: Count
    length: Count
    crc: Count


class Meta(Record):
    query: Name
    rollout: Small
    role: Name
    invocation: Small
    attempt: Count
    index: Count
    scores: Scores
    n: Count


class Append(Record):
    meta: Meta
    arrays: dict[Name, ArraySpec]


def _locked(method: Callable[Concatenate[Spool, P], R]) -> Callable[Concatenate[Spool, P], R]:
    @functools.wraps(method)
    def holding(spool: Spool, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with spool._lock:
            return method(spool, *args, **kwargs)

    return holding


class Spool:
    """One role's trajectories in a folder. One process writes; `digest` is the run's. Thread-safe: a server
    appends and syncs while the trainer reads and truncates. Raises ConfigError when the folder cannot be used,
    CorruptionError for one that is not a spool's."""

    def __init__(
        self, path: str | Path, *, role: str, digest: str, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.path, self.role, self.digest = Path(path), role, digest
        self._segment_bytes = segment_bytes
        self._lock = threading.RLock()
        self._index: dict[Identity, SpoolRef] = {}
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
            raise ConfigError(f"spool {self.path} cannot be used: {error}") from None

    @_locked
    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            with contextlib.suppress(Refusal):
                self.sync()
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def segments(self) -> list[int]:
        return sorted(int(p.stem) for p in self.path.glob("*.spool"))

    def _name(self, segment: int) -> Path:
        return self.path / f"{segment:08d}.spool"

    # -- writing --------------------------------------------------------------------------------------------

    @_locked
    def append(self, meta: Meta, payload: Buffer) -> SpoolRef:
        """Add a record; it is durable after the next sync()."""
        identity = (meta.query, meta.rollout, meta.invocation, meta.attempt)
        encoded = codec.encode(meta)
        head = encoded + b"\0" * _padding(len(encoded))
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
        record = b"".join((_FRAME.pack(_MAGIC, len(encoded), len(payload), crc, 0), head, payload))
        record += b"\0" * _padding(len(record))
        written = 0
        try:
            while written < len(record):
                written += os.pwrite(self._file, memoryview(record)[written:], offset + written)
        except OSError as error:
            self._undo()
            raise Refusal("UNAVAILABLE", f"spool {self.path}: {error}") from None
        self._size += len(record)
        ref = SpoolRef(self.role, self._segment, offset, len(payload), crc)
        self._index[identity] = ref
        self._fresh.append(identity)
        self._newest[self._segment] = max(self._newest.get(self._segment, 0), meta.index)
        return ref

    @_locked
    def sync(self) -> None:
        """Make everything appended since the last sync durable, or raise UNAVAILABLE and forget all of it."""
        taken_back, self._taken_back = self._taken_back, False
        if taken_back:
            raise Refusal("UNAVAILABLE", f"spool {self.path}: what was appended could not be kept")
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
            raise Refusal("UNAVAILABLE", f"spool {self.path}: {error}") from None
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
            raise Refusal("UNAVAILABLE", f"spool {path}: {error}") from None
        self._file, self._segment, self._size, self._synced = file, segment, size, size

    @_locked
    def truncate(self, below: int) -> int:
        """Delete closed segments that hold only groups with an index below `below`; returns how many. Pass
        the cursor of the oldest checkpoint that a run may still go back to."""
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
        view = _mapped(path)
        if bytes(view[: len(HEAD)]) != HEAD:
            if is_last and len(view) < len(HEAD):
                return 0
            if bytes(view[: len(_KIND)]) == _KIND:
                theirs = bytes(view[len(_KIND) : len(HEAD)]).partition(b"\n")[0].decode(errors="replace")
                raise CorruptionError(
                    f"{path} has format {theirs}, this program knows format 2: go on with the mgrpo that began the run"
                )
            raise CorruptionError(f"{path} is not a spool segment")
        at = len(HEAD)
        while at < len(view):
            record = _next_record(view, at)
            if record is None:
                return at
            start, (meta, crc, length, after) = record
            if start > at:
                log.error("%s is damaged from byte %d to %d; the records behind are kept", path, at, start)
            identity = (meta.query, meta.rollout, meta.invocation, meta.attempt)
            self._index[identity] = SpoolRef(self.role, segment, start, length, crc)
            self._newest[segment] = max(self._newest.get(segment, 0), meta.index)
            at = after
        return len(view)

    def read(self, ref: SpoolRef) -> Trajectory:
        """The trajectory at `ref`; its arrays are read-only, aligned views of the bytes read. Raises CorruptionError
        naming file and byte."""
        path = self._name(ref.segment)
        if ref.role != self.role:
            raise ValueError(f"reference into the spool of {ref.role!r}, this one is {self.role!r}")
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(ref.offset)
                head = file.read(_FRAME.size)
                meta_length = _FRAME.unpack(head)[1] if len(head) == _FRAME.size else 0
                payload = _payload_at(min(meta_length, MAX_META))
                file.seek(ref.offset)
                record = _read(file, payload + ref.length)
        except OSError as error:
            raise CorruptionError(f"{path}: {error}") from None
        found = _parse(record, 0)
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
                "WRONG_RUN", f"run digest {request.sender.run!r}, this spool serves {self.digest!r}"
            )
        if request.sender.role != "worker":
            raise Refusal("FORBIDDEN", f"{request.sender.role!r} may not append, only a worker may")
        body = request.decode(Append)
        if body.meta.role != self.role:
            raise Refusal(
                "FORBIDDEN", f"trajectory of role {body.meta.role!r}, this is the spool of {self.role!r}"
            )
        return Reply(self.append(body.meta, _checked_payload(body, request.frames)))


class SpoolClient:
    """A worker's pipelined way into one role's spool."""

    def __init__(self, url: str, *, digest: str, role: str, name: str = "worker", **options: Any) -> None:
        sender = Sender(digest, "worker", name, "")
        self.url = url
        self._link = Client(url, peer=f"spool of {role}", sender=sender, **{"window": 64, **options})

    def append(self, trajectory: Trajectory, *, attempt: int = 0, index: int = 0) -> Future[SpoolRef]:
        """Send a trajectory; the future has its reference once it is durable. `index` is its group's."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "tokens": np.asarray(trajectory.tokens, np.int32),
            "logprobs": np.asarray(trajectory.logprobs, np.float32),
            "versions": np.asarray(trajectory.versions, np.int32),
            "loss_mask": np.asarray(trajectory.loss_mask, np.uint8),
        }
        specs, frames = codec.pack_arrays(arrays)
        t = trajectory
        meta = Meta(t.query, t.rollout, t.role, t.invocation, attempt, index, t.scores, len(t))
        answer = self._link.submit(
            "append", Append(meta, specs), frames, queue=f"append({t.query!r})", bulk=True
        )
        result: Future[SpoolRef] = Future()
        answer.add_done_callback(lambda done: _pass_on(done, result))
        return result

    def flush(self, timeout: float | None = None) -> None:
        self._link.flush(timeout)

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> SpoolClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(path: Path) -> memoryview:
    """The file's bytes, read page by page as they are touched."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def _pass_on(answer: Future[Answer], result: Future[SpoolRef]) -> None:
    error = answer.exception()
    if error is not None:
        result.set_exception(error)
    else:
        result.set_result(answer.result().decode(SpoolRef))


def _read(file: io.RawIOBase, size: int) -> memoryview:
    """The next `size` bytes, or those up to the file's end, at an aligned address: numpy aligns what it allocates."""
    buffer = np.empty(size, np.uint8).data
    filled = 0
    while filled < size and (got := file.readinto(buffer[filled:])):
        filled += got
    return buffer[:filled].toreadonly()


def _padding(length: int) -> int:
    return -length % 8


def _payload_at(meta_length: int) -> int:
    """Where a record's payload begins, from the record's own beginning."""
    return _FRAME.size + meta_length + _padding(meta_length)


def _next_record(view: memoryview, at: int) -> tuple[int, tuple[Meta, int, int, int]] | None:
    """(start, what _parse says of it) of the first whole record at or behind `at`; None when there is none."""
    data: Any = view.obj  # bytes or a map: both can search
    while (found := _parse(view, at)) is None:
        at = data.find(_MAGIC_BYTES, at + 1)
        while at % 8 and at >= 0:
            at = data.find(_MAGIC_BYTES, at + 1)
        if at < 0:
            return None
    return at, found


def _parse(view: memoryview, at: int) -> tuple[Meta, int, int, int] | None:
    """(meta, crc, payload length, where the next record starts) of the record at `at`, or None when it is not
    whole."""
    if at + _FRAME.size > len(view):
        return None
    magic, meta_length, length, crc, _ = _FRAME.unpack_from(view, at)
    body = at + _FRAME.size
    end = at + _payload_at(meta_length) + length
    if magic != _MAGIC or end > len(view):
        return None
    if google_crc32c.value(bytes(view[body:end])) != crc:
        return None
    meta = codec.decode(view[body : body + meta_length], Meta)
    return meta, crc, length, end + _padding(end - at)


def _checked_payload(body: Append, frames: Sequence[Buffer]) -> bytes:
    """The canonical payload of an append request; raises BadMessage for anything that is not a trajectory."""
    meta = body.meta
    codec.check_names([meta.query, *meta.scores])
    codec.check_finite("score", meta.scores.values())
    if set(body.arrays) != set(_ARRAYS):
        raise BadMessage(f"arrays {sorted(body.arrays)}, expected {sorted(_ARRAYS)}")
    arrays = codec.unpack_arrays(body.arrays, frames)
    for name, dtype in _ARRAYS.items():
        if arrays[name].shape != (meta.n,) or arrays[name].dtype != np.dtype(dtype):
            raise BadMessage(
                f"{name} is {arrays[name].dtype}{arrays[name].shape}, expected {dtype}({meta.n},)"
            )
    if not np.isfinite(arrays["logprobs"]).all():
        raise BadMessage("log-probs are not finite")
    if meta.n and arrays["loss_mask"].max() > 1:
        raise BadMessage("loss_mask holds more than 0 and 1")
    return b"".join(arrays[name].tobytes() for name in _ARRAYS)


def trajectory(meta: Meta, payload: Buffer) -> Trajectory:
    """A trajectory whose arrays are views of payload."""
    if len(payload) != meta.n * PER_TOKEN:
        raise CorruptionError(f"payload of {len(payload)} bytes for {meta.n} tokens")
    views: dict[str, Any] = {}
    at = 0
    for name, dtype in _ARRAYS.items():
        views[name] = np.frombuffer(payload, dtype, meta.n, at)
        at += meta.n * _BYTES[name]
    return Trajectory(meta.query, meta.rollout, meta.role, meta.invocation, scores=dict(meta.scores), **views)
