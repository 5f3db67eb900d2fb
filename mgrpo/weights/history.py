"""The sender's memory: one copy of the newest version, the *base*, and the patches that led to it.

Every patch is its own inverse, so the base and the patches since a version give that version's bytes back: a slow
receiver gets the version that it began with to its end, and no second copy of the model is kept for it. Only where the
patches would be larger than the model (float32 weights change everywhere) is the version that somebody is in the middle
of copied, once.

    base      bytes of the model, in the engine's dtype
    patches   of the last VERSIONS versions, at most PATCHED of the model; more while somebody pulls
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mgrpo.weights.dtypes import dtype_name
from mgrpo.weights.layout import SIZES, Layout, Slice
from mgrpo.weights.patch import Bytes, Change, Patch, checksum, difference

if TYPE_CHECKING:
    import torch

BUCKET = 128 << 20  # bytes that are cast and brought to main memory at a time
VERSIONS = 4
PATCHED = 0.75
_THREADS = min(8, os.cpu_count() or 1)
Sums = np.ndarray[tuple[int], np.dtype[np.uint32]]


@dataclass(slots=True)
class _Kept:
    """A copy of an older version."""

    label: str
    tensors: list[Bytes]
    sums: Sums


class History:
    """Thread-safe: read() and the questions may come while put() is under way."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """dtype: what floating-point weights travel in; None: as they are."""
        self.layout: Layout | None = None
        self.label = ""  # of the newest complete version
        self._dtype = dtype
        self._lock = threading.RLock()
        self._base: list[Bytes] = []
        self._sums: dict[str, Sums] = {}
        self._patches: list[Patch] = []
        self._kept: _Kept | None = None
        self._undone: tuple[str, int, Bytes] | None = None  # what read() has last computed
        self._threads: ThreadPoolExecutor | None = None

    # -- the trainer -----------------------------------------------------------------------------------------------

    def put(
        self, label: str, tensors: Iterable[tuple[str, torch.Tensor]], pulled: Callable[[str], bool]
    ) -> None:
        """Take version `label`. pulled(label): whether somebody pulls that version, or what leads on from it. Raises
        ValueError where the tensors are others than the first time; then, and whatever the iterator raises, the version
        before stays the newest."""
        if self.layout is None:
            self._put_first(label, tensors)
            return
        patch = Patch(self.label, label, {})
        sums = self._sums[self.label].copy()
        with self._lock:
            self._patches.append(patch)
        try:
            for piece, data in self._cast_all(self.layout, tensors):
                self._put_slices(patch, sums, piece, data)
        except BaseException:
            self._take_back(patch)
            raise
        with self._lock:
            self._sums[label] = sums
            self.label = label
            self._forget(pulled)
        if patch in self._patches:
            patch.pack()

    def _put_first(self, label: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        base, found = [], []
        for name, tensor in tensors:
            dtype = self._travels_in(tensor)
            whole = np.empty(tensor.numel() * dtype.itemsize, np.uint8)
            for start, data in self._buckets(tensor):
                whole[start : start + len(data)] = data
            base.append(whole)
            found.append((name, dtype_name(dtype), tuple(tensor.shape)))
            del tensor  # it may have been gathered, and the next one is before this name is bound again
        # The widest first, so that each tensor of the file is aligned.
        order = sorted(range(len(found)), key=lambda number: -SIZES[found[number][1]])
        layout, base = Layout.of(found[number] for number in order), [base[number] for number in order]
        sums = np.zeros(len(layout.slices), np.uint32)
        for piece in layout.slices:
            sums[piece.index] = checksum(base[piece.tensor][piece.start : piece.stop])
        with self._lock:
            self.layout, self.label, self._base, self._sums = layout, label, base, {label: sums}

    def _travels_in(self, tensor: torch.Tensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype

    def _buckets(self, tensor: torch.Tensor) -> Iterator[tuple[int, Bytes]]:
        """(first byte, bytes) of one part of a tensor after the other, as they travel."""
        import torch

        dtype = self._travels_in(tensor)
        flat, step = tensor.detach().reshape(-1), BUCKET // dtype.itemsize
        for start in range(0, max(1, flat.numel()), step):
            part = flat[start : start + step].to(dtype=dtype).cpu().contiguous()
            yield start * dtype.itemsize, part.view(torch.uint8).numpy()

    def _cast_all(
        self, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[list[Slice], list[Bytes]]]:
        """Bucket after bucket: its slices, and the new bytes of each."""
        numbers = {info.name: number for number, info in enumerate(layout.tensors)}
        for name, tensor in tensors:
            found = (name, dtype_name(self._travels_in(tensor)), tuple(tensor.shape))
            number = numbers.pop(name, None)
            expected = layout.tensors[number][:3] if number is not None else None
            if number is None or found != expected:
                raise ValueError(f"weights have {found}, the version before {expected}")
            offset = layout.tensors[number].offset
            for start, data in self._buckets(tensor):
                pieces = list(layout.slices_at(offset + start, offset + start + len(data)))
                yield pieces, [data[p.start - start : p.stop - start] for p in pieces]
            del tensor  # see above
        if numbers:
            raise ValueError(f"weights lack {min(numbers)}, which the version before has")

    def _put_slices(self, patch: Patch, sums: Sums, pieces: list[Slice], data: list[Bytes]) -> None:
        def one(piece: Slice, after: Bytes) -> Change | None:
            before = self._base[piece.tensor][piece.start : piece.stop]
            assert self.layout is not None
            change = difference(piece, self.layout.tensors[piece.tensor].itemsize, before, after)
            if change is not None:
                with self._lock:
                    before[:] = after
                    patch.changes[piece.index] = change
                    sums[piece.index] = change.crc
            return change

        if len(pieces) > 1:
            self._threads = self._threads or ThreadPoolExecutor(_THREADS, "mgrpo-weights")
            list(self._threads.map(one, pieces, data))
        else:
            for piece, after in zip(pieces, data, strict=True):
                one(piece, after)

    def _take_back(self, patch: Patch) -> None:
        """The base as it was before an unfinished patch."""
        with self._lock:
            for change in patch.changes.values():
                change.apply(self._base[change.slice.tensor][change.slice.start : change.slice.stop])
            self._patches.remove(patch)
            self._undone = None

    def _forget(self, pulled: Callable[[str], bool]) -> None:
        """Keep what somebody is in the middle of, and the last few patches."""
        assert self.layout is not None
        if self._kept is not None and not pulled(self._kept.label):
            self._kept = None
        size = self.layout.size
        while self._patches:
            oldest = self._patches[0]
            total = sum(patch.nbytes for patch in self._patches)
            if pulled(oldest.base):
                if total <= size:
                    break
                if self._kept is None:
                    self._kept = self._copy_of(oldest.base)
            elif len(self._patches) <= VERSIONS and total <= PATCHED * size:
                break
            self._patches.pop(0)
        known = {patch.base for patch in self._patches} | {self.label}
        known |= {self._kept.label} if self._kept else set()
        self._sums = {label: sums for label, sums in self._sums.items() if label in known}
        self._undone = None

    def _copy_of(self, label: str) -> _Kept:
        assert self.layout is not None
        tensors = [np.empty(info.nbytes, np.uint8) for info in self.layout.tensors]
        for piece in self.layout.slices:
            tensors[piece.tensor][piece.start : piece.stop] = self._slice_of(label, piece)
        return _Kept(label, tensors, self._sums[label])

    # -- receivers -------------------------------------------------------------------------------------------------

    def patches(self, base: str, label: str) -> list[Patch] | None:
        """What leads from one version to another; None where that is not known any more."""
        with self._lock:
            bases, labels = [p.base for p in self._patches], [p.label for p in self._patches]
            if base not in bases or label not in labels:
                return None
            found = self._patches[bases.index(base) : labels.index(label) + 1]
        return found if found and all(patch.data is not None for patch in found) else None

    def patch(self, label: str) -> Bytes | None:
        """The patch that leads to a version, as bytes."""
        with self._lock:
            return next((patch.data for patch in self._patches if patch.label == label), None)

    def sums(self, label: str) -> Sums | None:
        """crc32c of each slice of a version that can still be read."""
        with self._lock:
            return self._sums.get(label)

    def read(self, label: str, start: int, stop: int) -> bytes | None:
        """Bytes start..stop of a version's file; None where it is gone."""
        with self._lock:
            layout = self.layout
            if layout is None or label not in self._sums:
                return None
            head = len(layout.header)
            parts: list[bytes] = [layout.header[start:stop]]
            first, last = max(start - head, 0), min(stop - head, layout.size)
            if first < last:
                for piece in layout.slices_at(first, last):
                    data = self._slice_of(label, piece)
                    parts.append(data[max(0, first - piece.offset) : max(0, last - piece.offset)].tobytes())
            return b"".join(parts)

    def _slice_of(self, label: str, piece: Slice) -> Bytes:
        if self._kept is not None and self._kept.label == label:
            return self._kept.tensors[piece.tensor][piece.start : piece.stop]
        data = self._base[piece.tensor][piece.start : piece.stop]
        bases = [patch.base for patch in self._patches]
        since = self._patches[bases.index(label) :] if label in bases else []
        changes = [patch.changes[piece.index] for patch in since if piece.index in patch.changes]
        if not changes:
            return data
        if self._undone is None or self._undone[:2] != (label, piece.index):
            data = data.copy()
            for change in changes:
                change.apply(data)
            self._undone = (label, piece.index, data)
        return self._undone[2]

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()
