"""The trainer's side of weight sync over the link: it keeps the newest version, and answers who pulls it.

A receiver is sent patches where it holds a version that patches lead on from and they are shorter, else a whole
version; who begins a version gets it to its end, though newer ones are published meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import google_crc32c

from mgrpo.transport.codec import Buffer
from mgrpo.transport.server import Handler, Park, Reply, Request
from mgrpo.types import Probe
from mgrpo.weights.history import History
from mgrpo.weights.layout import SLICE, Layout
from mgrpo.weights.messages import FilesAre, GetChunk, GetFiles, GetWeights, Kind, PartIs, WeightsAre

if TYPE_CHECKING:
    import torch

CHUNK = 512 << 10  # bytes; each must cross the slowest link well within a heartbeat's time-out
PULL_S = 60.0  # a version of which no chunk was asked for so long is not being pulled any more


@dataclass(slots=True)
class _Version:
    """What is known of a version beside its bytes."""

    label: str
    version: int
    probe: Probe | None
    direct: bool = False


@dataclass(frozen=True, slots=True)
class VersionSize:
    """Bytes that a version takes on the link. nbytes: for a receiver that holds the version before; whole: for one that
    holds nothing."""

    nbytes: int
    whole: int

    @property
    def share(self) -> float:
        return self.nbytes / self.whole


@dataclass(slots=True)
class _Pull:
    """first: the version that is pulled, or the one that the patches lead on from. label: what it ends in."""

    first: str
    label: str
    asked: float

    def is_alive(self) -> bool:
        return time.monotonic() - self.asked < PULL_S


class WeightPublisher:
    """`publish` replaces what the handlers serve. Thread-safe."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """dtype: what floating-point weights travel in, that of the engine; None: as they are."""
        self._history = History(dtype)
        # Of two locks the upper one is taken first; the history's, which asks who pulls while it holds it, is between.
        self._lock = threading.Lock()
        self._pulls_lock = threading.Lock()
        self._versions: dict[str, _Version] = {}  # by label, the newest last
        self._pulls: dict[str, _Pull] = {}  # by who pulls
        self._files: tuple[FilesAre, bytes] | None = None

    # -- the trainer -----------------------------------------------------------------------------------------------

    def describe(self, files: dict[str, bytes]) -> None:
        """The policy's files without weights, as of policy_files."""
        data = b"".join(files.values())
        crc = int(google_crc32c.value(data))
        sizes = {name: len(content) for name, content in files.items()}
        with self._lock:
            self._files = FilesAre(f"files.{crc:08x}", sizes, crc), data

    def publish(
        self,
        label: str,
        version: int,
        tensors: Iterable[tuple[str, torch.Tensor]],
        probe: Probe | None = None,
    ) -> None:
        """Serve a version: (checkpoint name, tensor), in the same order each time. Raises ValueError where they are
        others than before, and what the iterator raises: then the version before stays the newest."""
        self._history.put(label, tensors, self._is_pulled)
        with self._pulls_lock:
            self._pulls = {peer: pull for peer, pull in self._pulls.items() if pull.is_alive()}
        with self._lock:
            known = {old: held for old, held in self._versions.items() if self._history.sums(old) is not None}
            self._versions = {**known, label: _Version(label, version, probe)}

    def announce(self, label: str, version: int, probe: Probe | None = None) -> None:
        """A version that the trainer has brought to the servers itself."""
        with self._lock:
            self._versions = {label: _Version(label, version, probe, direct=True)}

    @property
    def size(self) -> VersionSize | None:
        """Of the newest version; None where there is none, or where it came to the servers another way."""
        with self._lock:
            newest, layout = next(reversed(self._versions.values()), None), self._history.layout
        if newest is None or newest.direct or layout is None:
            return None
        whole, patch = _whole_size(layout), self._history.patch(newest.label)
        return VersionSize(whole if patch is None else min(len(patch), whole), whole)

    def newest(self) -> Iterator[bytes]:
        """The newest version as a file in safetensors format, piece by piece. Raises ValueError where there is none, or
        where it came to the servers another way; nothing may be published meanwhile."""
        with self._lock:
            newest, layout = next(reversed(self._versions.values()), None), self._history.layout
        if newest is None or newest.direct or layout is None:
            raise ValueError("no version is kept here")
        size = len(layout.header) + layout.size
        for start in range(0, size, SLICE):
            yield self._history.read(newest.label, start, min(start + SLICE, size)) or b""

    def _is_pulled(self, label: str) -> bool:
        with self._pulls_lock:
            return any(pull.first == label and pull.is_alive() for pull in self._pulls.values())

    def close(self) -> None:
        """End the threads."""
        self._history.close()

    # -- receivers -------------------------------------------------------------------------------------------------

    def handlers(self) -> Mapping[str, Handler]:
        """What an endpoint needs to serve the weights."""
        return {"weights.get": self._get, "weights.chunk": self._chunk, "weights.files": self._get_files}

    def _get_files(self, request: Request) -> Reply | Park:
        def poll() -> Reply | None:
            with self._lock:
                return None if self._files is None else Reply(self._files[0])

        return poll() or Park(poll, request.decode(GetFiles).wait_s, Reply(FilesAre()))

    def _get(self, request: Request) -> Reply | Park:
        wanted = request.decode(GetWeights)

        def poll() -> Reply | None:
            with self._lock:
                known = self._versions.get(wanted.pulling)
                if known is None or known.direct:
                    known = next(reversed(self._versions.values()), None)
                    if known is None or known.version < wanted.at_least:
                        return None
                parts = self._parts(known, wanted)
                self._pulled(_peer(request), known, parts)
            layout = self._history.layout
            probe = (list(known.probe.token_ids), list(known.probe.logprobs)) if known.probe else None
            return Reply(
                WeightsAre(known.label, known.version, layout.digest if layout else "", parts, probe)
            )

        return poll() or Park(poll, wanted.wait_s, Reply(WeightsAre("", -1)))

    def _pulled(self, peer: str, known: _Version, parts: list[PartIs]) -> None:
        with self._pulls_lock:
            self._pulls.pop(peer, None)
            if parts:
                first = parts[0].base or known.label
                self._pulls[peer] = _Pull(first, known.label, time.monotonic())

    def _parts(self, known: _Version, wanted: GetWeights) -> list[PartIs]:
        layout = self._history.layout
        if known.direct or known.label == wanted.have or layout is None:
            return []
        whole = len(layout.header) + layout.size
        patches = None if wanted.whole else self._history.patches(wanted.have, known.label)
        if patches and wanted.pulling != known.label:
            parts = [PartIs("patch", patch.base, patch.label, patch.nbytes, patch.crc) for patch in patches]
            if sum(part.size for part in parts) < whole:
                return parts
        return [
            PartIs("whole", "", known.label, whole),
            PartIs("sums", "", known.label, 4 * len(layout.slices)),
        ]

    def _chunk(self, request: Request) -> Reply:
        wanted = request.decode(GetChunk)
        end = wanted.offset + min(wanted.length, CHUNK)
        data = self._bytes(wanted.kind, wanted.label, wanted.offset, end)
        with self._pulls_lock:
            if (pull := self._pulls.get(_peer(request))) is not None:
                pull.asked = time.monotonic()
        return Reply("") if data is None else Reply(wanted.label, [data])

    def _bytes(self, kind: Kind, label: str, start: int, stop: int) -> Buffer | None:
        if kind == "whole":
            return self._history.read(label, start, stop)
        if kind == "sums":
            sums = self._history.sums(label)
            return None if sums is None else sums.astype("<u4").tobytes()[start:stop]
        if kind == "patch":
            patch = self._history.patch(label)
            return None if patch is None else patch.data[start:stop]
        with self._lock:
            held = self._files
        return memoryview(held[1])[start:stop] if held is not None and held[0].label == label else None


def _whole_size(layout: Layout) -> int:
    """A version's file and its checksums."""
    return len(layout.header) + layout.size + 4 * len(layout.slices)


def _peer(request: Request) -> str:
    return f"{request.sender.name}#{request.sender.session}"
