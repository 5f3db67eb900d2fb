"""Weight sync over the link: a trainer serves its newest weights, an engine fetches what it has not got.

    weights.get   {have, at_least, wait_s}  -> label, version, size and checksum of the newest version
    weights.chunk {label, offset, length}   -> those bytes, in safetensors format; label "" when that version is gone

A version is pulled in chunks, a few in flight at a time. The only deadline is one on progress: so long without a chunk.
After a reconnect the missing chunks are asked for again, and no others. Whoever pulls gets his version to its end: a
trainer that publishes meanwhile keeps the older version for as long as chunks of it are asked for, but never more than
one beside the newest; a pull whose version is gone begins again with the newest.

A worker on another server asks once for the policy's files without weights (configuration, tokenizer), which come the
same way, and builds its model from them. Labels are `<role>.e<epoch>.v<version>`: after a rollback the same version
number may name other weights, and so it may for another role.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import google_crc32c
import msgspec

from mgrpo.errors import CorruptionError, DeadlineError
from mgrpo.transport.client import Answer, Client
from mgrpo.transport.codec import Buffer, Count, Name, Signed
from mgrpo.transport.server import Handler, Park, Reply, Request

CHUNK = 512 << 10  # bytes; each must cross the slowest link well within a heartbeat's time-out
IN_FLIGHT = 16  # chunks; 8 MiB keep a link of 100 MiB/s busy over 80 ms
PULL_S = 60.0  # a version of which no chunk was asked for so long is not being pulled any more
REPORT_S = 1.0  # between two reports of progress

Progress = Callable[[int, int], None]  # (bytes that have arrived, bytes in all)


class GetWeights(msgspec.Struct, array_like=True, frozen=True):
    """have: label of the weights the asker holds ("" for none). at_least: a version that would be of use to it."""

    have: Name = ""
    at_least: Signed = 0
    wait_s: float = 0.0


class WeightsAre(msgspec.Struct, array_like=True, frozen=True):
    """The newest version, of `size` bytes with this crc32c; version -1 when the wait was in vain."""

    label: Name
    version: Signed
    size: Count = 0
    crc: Count = 0


class GetChunk(msgspec.Struct, array_like=True, frozen=True):
    """Bytes of what is labelled `label`, from `offset` on."""

    label: Name
    offset: Count
    length: Count


class GetFiles(msgspec.Struct, array_like=True, frozen=True):
    wait_s: float = 0.0


class FilesAre(msgspec.Struct, array_like=True, frozen=True):
    """The policy's files, one after the other under one label; no files when the wait was in vain."""

    label: Name = ""
    files: dict[Name, Count] = msgspec.field(default_factory=dict)
    crc: Count = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """A version's label, number and safetensors bytes."""

    label: str
    version: int
    data: bytes


@dataclass(slots=True)
class _Served:
    """What chunks are cut from, without copying it."""

    label: str
    version: int
    data: bytes
    crc: int
    pulls: dict[str, float] = field(default_factory=dict)  # who is not done with it -> when he asked last

    def chunk(self, offset: int, length: int, peer: str) -> Buffer:
        end = offset + min(length, CHUNK)
        self.pulls[peer] = time.monotonic()
        if end >= len(self.data):
            del self.pulls[peer]
        return memoryview(self.data)[offset:end]

    def is_pulled(self) -> bool:
        return any(time.monotonic() - asked < PULL_S for asked in self.pulls.values())


class WeightsServer:
    """The trainer's side: `publish` replaces what the handlers serve. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: _Served | None = None
        self._pulled: _Served | None = None  # an older one that somebody has not pulled to its end
        self._policy_files: _Served | None = None
        self._files: dict[str, int] = {}

    def describe(self, files: dict[str, bytes]) -> None:
        """The policy's files without weights, as of policy_files."""
        data = b"".join(files.values())
        crc = google_crc32c.value(data)
        with self._lock:
            self._files = {name: len(content) for name, content in files.items()}
            self._policy_files = _Served(f"files.{crc:08x}", 0, data, crc)

    def publish(self, weights: Weights) -> None:
        served = _Served(weights.label, weights.version, weights.data, google_crc32c.value(weights.data))
        with self._lock:
            self._forget()
            if self._pulled is None:
                self._pulled = self._newest
            self._newest = served
            self._forget()

    def _forget(self) -> None:
        """The older version goes once nobody pulls it any more."""
        if self._pulled is not None and not self._pulled.is_pulled():
            self._pulled = None

    def handlers(self) -> Mapping[str, Handler]:
        """What an endpoint needs to serve the weights."""
        return {"weights.get": self._get, "weights.chunk": self._chunk, "weights.files": self._get_files}

    def _get_files(self, request: Request) -> Reply | Park:
        def poll() -> Reply | None:
            with self._lock:
                served, files = self._policy_files, self._files
            return None if served is None else Reply(FilesAre(served.label, files, served.crc))

        return poll() or Park(poll, request.decode(GetFiles).wait_s, Reply(FilesAre()))

    def _get(self, request: Request) -> Reply | Park:
        wanted = request.decode(GetWeights)

        def poll() -> Reply | None:
            with self._lock:
                newest = self._newest
                if newest is None or newest.version < wanted.at_least:
                    return None
                if newest.label != wanted.have:
                    newest.pulls[_peer(request)] = time.monotonic()
            return Reply(WeightsAre(newest.label, newest.version, len(newest.data), newest.crc))

        return poll() or Park(poll, wanted.wait_s, Reply(WeightsAre("", -1)))

    def _chunk(self, request: Request) -> Reply:
        wanted = request.decode(GetChunk)
        with self._lock:
            for served in (self._newest, self._pulled, self._policy_files):
                if served is not None and served.label == wanted.label:
                    chunk = served.chunk(wanted.offset, wanted.length, _peer(request))
                    self._forget()
                    return Reply(wanted.label, [chunk])
        return Reply("")


def _peer(request: Request) -> str:
    return f"{request.sender.name}#{request.sender.session}"


@dataclass(slots=True)
class Pull:
    """A pull under way. Keep one for each trainer and hand it to each fetch: one that was broken off, by a deadline or
    by what `progress` raises, goes on from where it was."""

    progress: Progress | None = None
    label: str = ""
    size: int = 0
    crc: int = 0
    chunks: dict[int, Buffer] = field(default_factory=dict)  # by offset
    received: int = 0

    def begin(self, label: str, size: int, crc: int) -> None:
        if (self.label, self.size, self.crc) != (label, size, crc):
            self.label, self.size, self.crc = label, size, crc
            self.chunks, self.received = {}, 0

    def take(self, offset: int, chunk: Buffer) -> None:
        self.received += len(chunk)
        self.chunks[offset] = chunk

    def finish(self) -> bytes:
        """All bytes. Raises CorruptionError when they are not those that were announced."""
        data = b"".join(self.chunks[offset] for offset in sorted(self.chunks))
        announced = (self.label, self.size, self.crc)
        self.begin("", 0, 0)
        if (len(data), google_crc32c.value(data)) != announced[1:]:
            raise CorruptionError(
                f"{announced[0]}: {len(data)} bytes arrived whose checksum is not that of the {announced[1]} announced"
            )
        return data


def fetch_weights(
    client: Client, have: str, at_least: int, wait_s: float, pull: Pull | None = None
) -> Weights | None:
    """The newest weights that the trainer behind `client` serves, once their version is at least `at_least`; None when
    they are those labelled `have`. Raises DeadlineError naming the trainer when there are none within wait_s, or when
    no chunk of them has arrived for the client's timeout."""
    pull = pull or Pull()
    request = GetWeights(have, at_least, wait_s)
    while True:
        answer = client.call("weights.get", request, timeout=wait_s + 5.0, step=at_least)
        newest = answer.decode(WeightsAre)
        if newest.version < 0:
            raise DeadlineError(
                f"{client.peer} at {client.url} had no weights of version {at_least} within {wait_s:g} s"
            )
        if newest.label == have:
            return None
        pull.begin(newest.label, newest.size, newest.crc)
        if _pull_all(client, pull, at_least):
            return Weights(newest.label, newest.version, pull.finish())


def fetch_policy_files(client: Client, wait_s: float) -> dict[str, bytes]:
    """The policy's files without weights; {} when the trainer had none within wait_s. Raises DeadlineError like
    fetch_weights."""
    pull = Pull()
    while True:
        found = client.call("weights.files", GetFiles(wait_s), timeout=wait_s + 5.0).decode(FilesAre)
        if not found.files:
            return {}
        pull.begin(found.label, sum(found.files.values()), found.crc)
        if _pull_all(client, pull, None):
            data, at = pull.finish(), 0
            files = {}
            for name, size in found.files.items():
                files[name] = data[at : at + size]
                at += size
            return files


def _pull_all(client: Client, pull: Pull, step: int | None) -> bool:
    """Ask for the chunks that are missing, in order; False when the version is gone."""
    missing = deque(offset for offset in range(0, pull.size, CHUNK) if offset not in pull.chunks)
    waiting: deque[tuple[int, Future[Answer]]] = deque()
    reported = time.monotonic()
    while missing or waiting:
        while missing and len(waiting) < IN_FLIGHT:
            offset = missing.popleft()
            request = GetChunk(pull.label, offset, CHUNK)
            queue = f"weights.chunk of {pull.label} at byte {offset}"
            future = client.submit("weights.chunk", request, step=step, queue=queue, bulk=True)
            waiting.append((offset, future))
        offset, future = waiting[0]
        try:
            answer = future.result(REPORT_S)
        except DeadlineError as error:
            raise DeadlineError(
                f"{error}; of {pull.label} {pull.received} of {pull.size} bytes have arrived"
            ) from None
        except TimeoutError:
            pass
        else:
            if answer.decode(str) != pull.label:
                return False
            waiting.popleft()
            pull.take(offset, answer.frames[0])
        if pull.progress is not None and time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            pull.progress(pull.received, pull.size)
    return True
