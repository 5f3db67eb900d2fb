"""One launcher a folder: a lock that the kernel drops with the last process that holds it, whatever ended it.

The lock file exists as long as a launcher, and longer when one was killed, so whether a run is live is asked of the
lock and never of the file. The launcher's processes inherit the lock: those that a killed launcher left behind, on
their way to a last checkpoint, still keep others out of the folder. That, and the question who holds it, asked with a
shared lock, is why this is flock itself and no library's lock, which is one process' alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from mgrpo.errors import ConfigError
from mgrpo.waiting import wait_until

TRY_SECONDS = 1.0  # `is_locked` in another process holds the lock for an instant


def take_lock(path: Path) -> int:
    """The descriptor that holds the lock file at `path`; closing it, in every process that inherited it, gives the lock
    back. Raises ConfigError when another process holds the lock or the file cannot be made."""
    held = (
        "another mgrpo train is running in this folder, or processes of one that was killed are still ending"
    )
    return wait_until(
        lambda: _try_lock(path), TRY_SECONDS, lambda: f"{path.parent}: {held}", error=ConfigError
    )


def _try_lock(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{path.parent}: cannot write there ({error.strerror})") from None
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, path):  # and not a file that the last holder has just deleted
            return descriptor
    os.close(descriptor)
    return None


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock file at `path` now. A file that nobody holds was left by a kill -9."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
