"""Weights as safetensors files, written tensor after tensor: the header, which names every place in the file, is known
before the first tensor exists. Above FILE_BYTES there are several files and an index, in Hugging Face's layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mgrpo.model.stream import PublishedTensor
from mgrpo.weights.dtypes import dtype_name
from mgrpo.weights.layout import Layout

FILE_BYTES = 5_000_000_000
"""The most data that one file holds, unless one tensor alone is larger."""


def write_weights(
    folder: Path,
    expected: Sequence[PublishedTensor],
    tensors: Iterable[tuple[str, Tensor]],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write `tensors`, which are those of `expected` in that order, into `folder`. Holds one of them at a time. Raises
    OSError, and ValueError where another tensor comes than was expected."""
    files = _split(expected, file_bytes)
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    coming = iter(tensors)
    for name, members in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            _write_file(file, members, coming)
    for extra, _ in coming:
        raise ValueError(f"{extra} comes after the {len(expected)} tensors that were expected")
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in expected)},
            "weight_map": {t.name: name for name, members in zip(names, files, strict=True) for t in members},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)


def _split(expected: Sequence[PublishedTensor], file_bytes: int) -> list[list[PublishedTensor]]:
    """The tensors of each file."""
    files: list[list[PublishedTensor]] = [[]]
    size = 0
    for tensor in expected:
        if files[-1] and size + tensor.nbytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return files


def _write_file(
    file: BinaryIO, members: Sequence[PublishedTensor], coming: Iterator[tuple[str, Tensor]]
) -> None:
    # Wide types first, as the format's own writer has them, so that every tensor is aligned.
    ordered = sorted(members, key=lambda t: (-t.dtype.itemsize, t.name))
    layout = Layout.of((t.name, dtype_name(t.dtype), t.shape) for t in ordered)
    offsets = {info.name: info.offset for info in layout.tensors}
    file.write(layout.header)
    begin = file.tell()
    for t in members:
        name, tensor = next(coming, (None, None))
        if name is None or tensor is None:
            raise ValueError(f"{t.name} did not come")
        if (name, tensor.dtype, tuple(tensor.shape)) != (t.name, t.dtype, t.shape):
            raise ValueError(
                f"{name} {tensor.dtype} {tuple(tensor.shape)} came where {t.name} {t.dtype} {t.shape} was expected"
            )
        file.seek(begin + offsets[name])
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(data.numpy().data)
        del tensor, data  # before the next one is made
