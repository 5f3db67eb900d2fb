"""Files that are complete or absent at every moment, on a disk that may fill up and a machine that may lose power.

A file is written beside its place, synced, renamed into it, and its folder is synced: without the last step a power cut
may forget the name although the bytes are there.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(path: str | Path, data: bytes | str, mode: int = 0o644) -> None:
    """Replace the file at `path` by `data` (text as UTF-8), or leave it as it was; `mode` holds from the first byte on.
    Raises OSError."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(target.parent)


def remove_partials(folder: str | Path) -> None:
    """Delete what killed processes have left of `write_atomic`; for a folder that nobody else writes to now. Raises
    OSError."""
    for left in Path(folder).glob(".*.partial"):
        if left.is_file():
            left.unlink(missing_ok=True)


def sync_folder(path: str | Path) -> None:
    """Make the entries of the folder at `path` (new, renamed and deleted names) durable. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_tree(path: str | Path) -> None:
    """Make every file and every name below the folder at `path` durable. Raises OSError."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            file = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        sync_folder(folder)
