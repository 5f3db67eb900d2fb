"""Whole versions and patches from files, in a server's worker.

    whole   a safetensors file, and beside it the checksum of each slice; checked, then tensor after tensor through
            vLLM's layerwise reload
    patch   mgrpo/weights/patch.py; checked, then in place (in_place.py)

The file is mapped or read piece by piece: no whole model is in memory beside the one that serves. What is damaged or
does not lead on from the version that is here is refused before anything is written. A failure after that leaves the
model *torn*: it holds no version, and takes whole ones only.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch

from mgrpo.engines.vllm.plugin import cpu
from mgrpo.engines.vllm.plugin.in_place import InPlace, Unfit
from mgrpo.engines.vllm.plugin.reload import apply_in_place, reloading
from mgrpo.errors import CorruptionError
from mgrpo.weights.dtypes import torch_dtype
from mgrpo.weights.layout import Layout
from mgrpo.weights.patch import Bytes, bytes_of, checksum, parse_changes

SUMS = ".sums"  # appended to the name of a whole's file: u32 crc32c of each slice, little-endian
BLOCK = 16 << 20  # bytes that are read and checked at a time


@dataclass(slots=True)
class Held:
    """What a worker holds. label: "" for weights that are no version of a trainer's, and for torn ones. proven: a patch
    has been read back since the last whole, and was right."""

    label: str = ""
    layout: Layout | None = None
    proven: bool = False


class WeightLoading:
    """Mixed into the worker. Answers: {"label": what it holds now, "error": "" or what it refused, "seconds": ...}."""

    vllm_config: Any  # the worker's own
    model_runner: Any
    mgrpo_held = Held()  # replaced, never changed: the class' own is shared
    _mgrpo_reloading = staticmethod(reloading)
    _mgrpo_apply = staticmethod(apply_in_place)

    def mgrpo_info(self) -> dict[str, object]:
        """What this worker holds."""
        return {"label": self.mgrpo_held.label, "error": "", "seconds": 0.0}

    def mgrpo_load(self, file: str, label: str) -> dict[str, object]:
        """Take a whole version."""
        return self._mgrpo_answer(lambda: self._mgrpo_load(Path(file), label))

    def mgrpo_patch(self, file: str, base: str, label: str, size: int, crc: int) -> dict[str, object]:
        """Take what changed from version `base` to `label`: a file of `size` bytes with this crc32c."""
        return self._mgrpo_answer(lambda: self._mgrpo_patch(Path(file), base, label, size, crc))

    def _mgrpo_answer(self, act: Callable[[], None]) -> dict[str, object]:
        """What a worker raises may end its engine, so that all errors are answers."""
        began, error = time.perf_counter(), ""
        try:
            act()
        except Exception as failure:
            kind = "" if isinstance(failure, CorruptionError | Unfit) else f"{type(failure).__name__}: "
            error = f"{kind}{failure}"
        return {"label": self.mgrpo_held.label, "error": error, "seconds": time.perf_counter() - began}

    def _mgrpo_load(self, file: Path, label: str) -> None:
        layout, data = open_whole(file)
        self.mgrpo_held = Held()
        model = self.model_runner.get_model()
        with self._mgrpo_reloading(model, self.vllm_config) as load:
            load(tensors_of(layout, data))
        self.mgrpo_held = Held(label, layout)

    def _mgrpo_patch(self, file: Path, base: str, label: str, size: int, crc: int) -> None:
        held, model = self.mgrpo_held, self.model_runner.get_model()
        if held.label != base or held.layout is None:
            raise CorruptionError(f"a patch of {base} meets {held.label or 'weights of no version'}")
        if self.vllm_config.quant_config is not None:
            raise Unfit("quantized weights take no patches")
        with file.open("rb") as opened:
            read = _reader(opened.fileno())
            if (found := os.fstat(opened.fileno()).st_size) != size or _crc_of(read, size) != crc:
                raise CorruptionError(f"{file}: {found} bytes are not the {size} of the patch")
            parallel = self.vllm_config.parallel_config
            alone = parallel.tensor_parallel_size == 1 and parallel.pipeline_parallel_size == 1
            # Reading back costs a pass over the weights: always on a CPU, on a GPU until one patch has been right.
            patch = InPlace(model, held.layout, whole=alone and (cpu.is_cpu(model) or not held.proven))
            try:
                self._mgrpo_apply(patch, model, self.vllm_config, parse_changes(read, size, held.layout))
            except BaseException:
                if patch.written:
                    self.mgrpo_held = Held()  # torn
                raise
        self.mgrpo_held = Held(label, held.layout, True)


def open_whole(file: Path) -> tuple[Layout, mmap.mmap]:
    """A whole version's file, mapped. Raises CorruptionError for one that is not what was written."""
    with file.open("rb") as opened:
        # Private and writable, since torch makes no tensors of read-only memory; nothing writes to it.
        data = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        layout = Layout.read(lambda at, size: data[at : at + size], len(data))
    except ValueError as error:
        raise CorruptionError(f"{file}: {error}") from None
    begin = len(layout.header)
    if len(data) != begin + layout.size:
        raise CorruptionError(f"{file}: {len(data)} bytes, its header announces {begin + layout.size}")
    sums = np.fromfile(file.with_name(file.name + SUMS), "<u4")
    if len(sums) != len(layout.slices):
        raise CorruptionError(f"{file}: {len(sums)} checksums of {len(layout.slices)} slices")
    whole = bytes_of(data)
    for piece in layout.slices:
        at = begin + piece.offset
        if checksum(whole[at : at + piece.nbytes]) != sums[piece.index]:
            name = layout.tensors[piece.tensor].name
            raise CorruptionError(f"{file}: {name} is damaged (bytes {piece.start}..{piece.stop})")
    return layout, data


def tensors_of(layout: Layout, data: mmap.mmap) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of a mapped file, in its order."""
    for info in layout.tensors:
        dtype, count = torch_dtype(info.dtype), info.nbytes // info.itemsize
        if not count:
            yield info.name, torch.empty(info.shape, dtype=dtype)
            continue
        at = len(layout.header) + info.offset
        yield info.name, torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(info.shape)


def _reader(number: int) -> Callable[[int, int], Bytes]:
    return lambda at, size: bytes_of(os.pread(number, size, at))


def _crc_of(read: Callable[[int, int], Bytes], size: int) -> int:
    crc = 0
    for at in range(0, size, BLOCK):
        crc = google_crc32c.extend(crc, read(at, min(BLOCK, size - at)).tobytes())
    return int(crc)
