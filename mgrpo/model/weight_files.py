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

FILE_BYTES = 5_000_000_000
"""The most data that one file holds, unless one tensor alone is larger."""
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


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
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    at = 0
    for t in sorted(members, key=lambda t: (-t.dtype.itemsize, t.name)):
        offsets[t.name] = at
        header[t.name] = {
            "dtype": _CODES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
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
