"""The receiver's side: pull a version in chunks, a few in flight at a time, into spools.

The only deadline is one on progress: so long without a chunk. After a reconnect the missing chunks are asked for again,
and no others; a pull that was broken off goes on from where it was. A version that is gone meanwhile is given up for
the newest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mgrpo.errors import CorruptionError, DeadlineError
from mgrpo.transport.client import Answer, Client
from mgrpo.types import Probe
from mgrpo.weights.layout import Layout
from mgrpo.weights.messages import FilesAre, GetChunk, GetFiles, GetWeights, PartIs, WeightsAre
from mgrpo.weights.publisher import CHUNK
from mgrpo.weights.version import Part, Spool, Weights

IN_FLIGHT = 16  # chunks; 8 MiB keep a link of 100 MiB/s busy over 80 ms
REPORT_S = 1.0  # between two reports of progress

Progress = Callable[[int, int], None]  # (bytes that have arrived, bytes in all)


@dataclass(slots=True)
class _Pulled:
    """One part on its way."""

    part: PartIs
    spool: Spool
    missing: deque[int]  # offsets of chunks


@dataclass(slots=True)
class Pull:
    """A pull under way. Keep one for each trainer and hand it to each fetch: one that was broken off, by a deadline or
    by what `progress` raises, goes on from where it was. folder: for parts too large for main memory."""

    progress: Progress | None = None
    folder: Path | None = None
    layout: Layout | None = None
    """Of the version that came last."""
    received: int = 0
    """Bytes of the pull under way."""
    _parts: list[_Pulled] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Of the version that is being pulled; "" for none."""
        return self._parts[-1].part.label if self._parts else ""

    @property
    def pulling(self) -> str:
        """Label of a whole version that has partly arrived."""
        return self.label if self._parts and self._parts[0].part.kind == "whole" else ""

    @property
    def size(self) -> int:
        return sum(pulled.part.size for pulled in self._parts)

    def begin(self, parts: list[PartIs]) -> None:
        """Pull these; what of them is there stays."""
        if [pulled.part for pulled in self._parts] != parts:
            self.reset()
            self._parts = [
                _Pulled(part, Spool(part.size, self.folder), deque(range(0, part.size, CHUNK)))
                for part in parts
            ]

    def reset(self) -> None:
        """Forget what has arrived."""
        for pulled in self._parts:
            pulled.spool.close()
        self._parts, self.received = [], 0

    def finish(self) -> list[Part]:
        """The parts, all there. Raises CorruptionError when they are not those that were announced."""
        parts, self._parts, self.received = self._parts, [], 0
        sums = next((pulled.spool for pulled in parts if pulled.part.kind == "sums"), None)
        out = []
        for pulled in parts:
            part, spool = pulled.part, pulled.spool
            if part.kind in ("patch", "files") and (crc := spool.checksum()) != part.crc:
                raise CorruptionError(
                    f"{part.label}: {part.size} bytes arrived whose crc32c is {crc:08x}, announced is {part.crc:08x}"
                )
            if part.kind != "sums":
                table = np.frombuffer(sums.read(0, sums.size), "<u4") if sums is not None else None
                out.append(Part(part.base, part.label, spool, table))
        return out

    def run(self, client: Client, step: int | None) -> bool:
        """Ask for the chunks that are missing, in order; False when the version is gone."""
        missing = deque((pulled, offset) for pulled in self._parts for offset in pulled.missing)
        waiting: deque[tuple[_Pulled, int, Future[Answer]]] = deque()
        reported = time.monotonic()
        while missing or waiting:
            while missing and len(waiting) < IN_FLIGHT:
                pulled, offset = missing.popleft()
                request = GetChunk(pulled.part.kind, pulled.part.label, offset, CHUNK)
                queue = f"weights.chunk of {self.label} at byte {offset}"
                future = client.submit("weights.chunk", request, step=step, queue=queue, bulk=True)
                waiting.append((pulled, offset, future))
            pulled, offset, future = waiting[0]
            try:
                answer = future.result(REPORT_S)
            except DeadlineError as error:
                raise DeadlineError(
                    f"{error}; of {self.label} {self.received} of {self.size} bytes have arrived"
                ) from None
            except TimeoutError:
                pass
            else:
                if answer.decode(str) != pulled.part.label:
                    self.reset()
                    return False
                waiting.popleft()
                self._take(pulled, offset, answer.frames[0])
            if self.progress is not None and time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                self.progress(self.received, self.size)
        return True

    def _take(self, pulled: _Pulled, offset: int, chunk: bytes | bytearray | memoryview) -> None:
        if len(chunk) != min(CHUNK, pulled.part.size - offset):
            raise CorruptionError(
                f"{pulled.part.label}: {len(chunk)} bytes arrived at byte {offset} of {pulled.part.size}"
            )
        pulled.spool.write(offset, chunk)
        pulled.missing.remove(offset)  # nearly always the first
        self.received += len(chunk)


def fetch_weights(
    client: Client, have: str, at_least: int, wait_s: float, pull: Pull | None = None, *, whole: bool = True
) -> Weights | None:
    """The newest weights that the trainer behind `client` serves, once their version is at least `at_least`, or the
    version whose pull was broken off; None when they are those labelled `have`. whole: not as patches of what came last
    through this `pull`. Raises DeadlineError naming the trainer when there are none within wait_s, or when no chunk of
    them has arrived for the client's timeout; CorruptionError where what arrived is not what was announced."""
    pull = pull or Pull()
    while True:
        request = GetWeights(have, whole or pull.layout is None, pull.pulling, at_least, wait_s)
        answer = client.call("weights.get", request, timeout=wait_s + 5.0, step=at_least)
        newest = answer.decode(WeightsAre)
        if newest.version < 0:
            raise DeadlineError(
                f"{client.peer} at {client.url} had no weights of version {at_least} within {wait_s:g} s"
            )
        if newest.label == have:
            return None
        if newest.parts and newest.parts[0].base and pull.layout and pull.layout.digest != newest.layout:
            whole = True  # patches of other tensors than those it has
            continue
        pull.begin(newest.parts)
        if pull.run(client, at_least):
            return _weights(pull, newest)


def _weights(pull: Pull, newest: WeightsAre) -> Weights:
    parts = pull.finish()
    if parts and not parts[0].base:
        try:
            pull.layout = parts[0].spool.layout()
        except ValueError as error:
            raise CorruptionError(f"{newest.label}: {error}") from None
        if pull.layout.digest != newest.layout:
            raise CorruptionError(f"{newest.label}: its header arrived damaged")
    probe = Probe(tuple(newest.probe[0]), tuple(newest.probe[1])) if newest.probe is not None else None
    layout = pull.layout if pull.layout is not None else Layout(b"", ())
    return Weights(newest.label, newest.version, layout, tuple(parts), probe)


def fetch_policy_files(client: Client, wait_s: float) -> dict[str, bytes]:
    """The policy's files without weights; {} when the trainer had none within wait_s. Raises DeadlineError like
    fetch_weights."""
    pull = Pull()
    while True:
        found = client.call("weights.files", GetFiles(wait_s), timeout=wait_s + 5.0).decode(FilesAre)
        if not found.files:
            return {}
        pull.begin([PartIs("files", "", found.label, sum(found.files.values()), found.crc)])
        if pull.run(client, None):
            spool, at = pull.finish()[0].spool, 0
            files = {}
            for name, size in found.files.items():
                files[name] = spool.read(at, size).tobytes()
                at += size
            return files
