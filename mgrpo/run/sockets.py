"""Where the local sockets of a run lie: in a folder of its own, which this user alone can enter.

A socket's path is limited to 107 bytes, so the folder cannot lie below an arbitrarily deep --out. It lies in
XDG_RUNTIME_DIR where that is set and ours, else in the temporary folder (TMPDIR), else, where that is too long, in
/tmp; its name follows from the run's folder. A part that is started by hand finds the folder that is there already
before it makes one, so it meets the others although its environment differs.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mgrpo.errors import ConfigError
from mgrpo.transport.address import IPC_PATH_LIMIT

NAME_BYTES = 32  # of a socket's own name, which must fit behind the folder


def socket_folder(root: Path) -> Path:
    """The folder of the sockets of the run in `root`: the one that exists, or else where it is to be made."""
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    folders = [place / f"mgrpo-{os.getuid()}-{digest}" for place in _places()]
    short = [folder for folder in folders if len(os.fsencode(folder)) + NAME_BYTES <= IPC_PATH_LIMIT]
    return next((folder for folder in short if _made_by_us(folder)), (short or folders)[0])


def check_sockets(folder: Path, names: Iterable[str]) -> None:
    """Raise ConfigError where sockets of these names could not be made in `folder`; nothing is written."""
    for name in names:
        size = len(os.fsencode(folder / name))
        if size > IPC_PATH_LIMIT:
            raise ConfigError(
                f"{folder / name}: this socket's path has {size} bytes, the limit is {IPC_PATH_LIMIT}; set TMPDIR or "
                f"XDG_RUNTIME_DIR to a folder with a shorter path, or give the agent a shorter name"
            )
    if os.path.lexists(folder):
        _check_private(folder)
    elif not os.access(folder.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder.parent}: the run's sockets cannot be made there; set TMPDIR or XDG_RUNTIME_DIR to a folder that "
            f"can be written"
        )


def make_sockets(folder: Path) -> None:
    """Make the folder, or check that the one that exists is ours alone. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        pass  # something else of that name, which the check describes
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot make the folder of the run's sockets ({error.strerror}); set TMPDIR or XDG_RUNTIME_DIR "
            f"to another place"
        ) from None
    _check_private(folder)


def _check_private(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "it is a link" if stat.S_ISLNK(found.st_mode) else "it is no folder"
    elif found.st_uid != os.getuid():
        what = f"it belongs to user {found.st_uid}, not to {os.getuid()}"
    elif found.st_mode & 0o077:
        what = f"its mode is {stat.S_IMODE(found.st_mode):04o}, not 0700"
    else:
        return
    raise ConfigError(
        f"{folder}: others could take over the run's sockets here: {what}. Remove it, or set TMPDIR or XDG_RUNTIME_DIR "
        f"to another place"
    )


def _places() -> list[Path]:
    places = []
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and _is_ours(Path(runtime)):
        places.append(Path(runtime))
    return [*places, Path(tempfile.gettempdir()), Path("/tmp")]


def _made_by_us(folder: Path) -> bool:
    """What others put at this place must not draw us there."""
    try:
        return folder.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _is_ours(place: Path) -> bool:
    """After `sudo -E` or in a container the variable may name a folder of somebody else, or none."""
    try:
        found = place.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and os.access(place, os.W_OK | os.X_OK)
