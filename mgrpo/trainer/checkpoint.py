"""Checkpoints of one trainer: a folder per step, complete or absent.

    <root>/step-00000020/{model.safetensors, optimizer.pt, manifest.json}

Written to a temporary folder, synced to disk, then renamed: a crash leaves either the old set or the new one. The
manifest holds a checksum of every file, so that a corrupt checkpoint is named and never trained from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from mgrpo.errors import CorruptionError
from mgrpo.model.policy import Policy, load_state_bytes, state_bytes

_MODEL, _OPTIMIZER, _MANIFEST = "model.safetensors", "optimizer.pt", "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says of itself."""

    path: Path
    step: int


def save_checkpoint(
    root: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int
) -> Checkpoint:
    """Write step `step` durably and delete all but the last `keep`. Returns once the bytes are on disk."""
    final = root / f"step-{step:08d}"
    partial = root / f".step-{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / _MODEL).write_bytes(state_bytes(policy.model))
    torch.save(optimizer.state_dict(), partial / _OPTIMIZER)
    files = {name: _checksum(partial / name) for name in (_MODEL, _OPTIMIZER)}
    (partial / _MANIFEST).write_text(json.dumps({"step": step, "crc32c": files}))
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    shutil.rmtree(
        final, ignore_errors=True
    )  # a run that went back to an earlier checkpoint writes this step again
    partial.rename(final)
    _sync(root)
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(final, step)


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint below root, or None. Raises CorruptionError naming what is damaged."""
    folders = _folders(root)
    return _checked(folders[-1]) if folders else None


def checkpoints_below(root: Path) -> Iterator[Checkpoint]:
    """Every complete checkpoint below root, oldest first. Raises CorruptionError naming what is damaged."""
    return (_checked(path) for path in _folders(root))


def _checked(path: Path) -> Checkpoint:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        step, sums = int(manifest["step"]), dict(manifest["crc32c"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptionError(f"{path / _MANIFEST}: unreadable checkpoint manifest ({error})") from None
    for name in (_MODEL, _OPTIMIZER):
        try:
            found = _checksum(path / name)
        except OSError as error:
            raise CorruptionError(f"{path / name}: missing from the checkpoint ({error.strerror})") from None
        if found != sums.get(name):
            raise CorruptionError(
                f"{path / name}: crc32c is {found:#010x}, expected {sums.get(name, 0):#010x}"
            )
    return Checkpoint(path, step)


def restore_checkpoint(checkpoint: Checkpoint, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state in place."""
    load_state_bytes(policy.model, (checkpoint.path / _MODEL).read_bytes())
    optimizer.load_state_dict(torch.load(checkpoint.path / _OPTIMIZER, weights_only=True))


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step-*") if p.is_dir())


def _checksum(path: Path) -> int:
    return int(google_crc32c.value(path.read_bytes()))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
