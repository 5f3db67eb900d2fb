"""The safetensors files of a model folder: headers first, then of each tensor the slice that its reader holds.

Everything that can be said from names, shapes and sizes is said before anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from mgrpo.errors import ConfigError
from mgrpo.weights.dtypes import torch_dtype
from mgrpo.weights.layout import Layout, TensorInfo

_BLOCK = 1 << 30  # bytes that are read in one call
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a file. Indexing it reads what the index names."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    at: int
    """Its first byte in the file."""

    def get_shape(self) -> list[int]:
        """As the slices of the package safetensors have it."""
        return list(self.shape)

    def blank(self) -> Tensor:
        """As large, without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __getitem__(self, index: tuple[slice, ...] | EllipsisType) -> Tensor:
        """A new tensor in main memory. Slices have no steps; rows that the first one does not name are not read. Raises
        ConfigError where the file has become shorter."""
        index = () if index is ... else index
        rows = range(*index[0].indices(self.shape[0])) if index else range(*self.shape[:1])
        shape = (len(rows), *self.shape[1:]) if self.shape else ()
        found = torch.empty(shape, dtype=self.dtype)
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        # Not mapped: pages of a mapped file count as this process's memory, and a file that is replaced would change
        # what has been read.
        self._read(self.at + row * rows.start, found)
        return found[(slice(None), *index[1:])] if index else found

    def _read(self, at: int, into: Tensor) -> None:
        left = memoryview(into.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.file.open("rb", buffering=0) as opened:
            while left:
                count = os.preadv(opened.fileno(), [left[:_BLOCK]], at)
                if not count:
                    raise ConfigError(
                        f"{self.file} ends at byte {at}, before the end of {self.name}: it was changed"
                    )
                left, at = left[count:], at + count


class WeightFiles:
    """What lies in a model folder's safetensors files, from their headers."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError naming the folder and the file that is missing, cut off or none, or a tensor that the
        index has elsewhere."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        found = hashlib.sha256()
        for file, expected in _files(folder):
            layout = _layout(file, folder)
            found.update(f"{file.name} {file.stat().st_size} ".encode() + layout.header)
            by_name = {info.name: info for info in layout.tensors}
            for name in expected if expected is not None else by_name:
                if name not in by_name:
                    raise ConfigError(
                        f"policy folder {folder}: {_INDEX} has {name} in {file.name}, which lacks it"
                    )
                self.tensors[name] = _stored(by_name[name], file, len(layout.header), folder)
        for name in ("config.json", _INDEX):
            if (folder / name).is_file():
                found.update((folder / name).read_bytes())
        self.digest = found.hexdigest()[:16]
        """Of config.json, the index, and the files' names, sizes and headers."""


def _files(folder: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """The files that hold a model, with the names that the index has in each; None where there is no index."""
    if (folder / _SINGLE).is_file():
        yield folder / _SINGLE, None
        return
    index = folder / _INDEX
    if not index.is_file():
        raise ConfigError(
            f"policy folder {folder} has neither {_SINGLE} nor {_INDEX}; a policy on several ranks is read from "
            "safetensors files"
        )
    try:
        weight_map: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(str(file), []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"policy folder {folder}: {_INDEX} is no index of weights ({error!r})") from None
    for file, names in sorted(by_file.items()):
        if Path(file).name != file or not (folder / file).is_file():
            raise ConfigError(
                f"policy folder {folder}: {_INDEX} names {file} ({len(names)} tensors), which is not there"
            )
        yield folder / file, names


def _layout(file: Path, folder: Path) -> Layout:
    try:
        with file.open("rb") as opened:
            number, size = opened.fileno(), file.stat().st_size
            layout = Layout.read(lambda at, count: os.pread(number, count, at), size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy folder {folder}: {file.name} cannot be read: {error}") from None
    if size != len(layout.header) + layout.size:
        raise ConfigError(
            f"policy folder {folder}: {file.name} has {size} bytes, its header says "
            f"{len(layout.header) + layout.size}: it is cut off or damaged"
        )
    return layout


def _stored(info: TensorInfo, file: Path, begin: int, folder: Path) -> StoredTensor:
    try:
        return StoredTensor(info.name, info.shape, torch_dtype(info.dtype), file, begin + info.offset)
    except ValueError as error:
        raise ConfigError(f"policy folder {folder}: {info.name} in {file.name}: {error}") from None
