"""Addresses: which urls are allowed, and binding that fails loudly.

libzmq traps handled here: binding an ipc path that another process serves silently steals it (a lock file
beside it refuses that), and plain tcp beyond this machine would be readable and writable by anyone.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
from pathlib import Path
from typing import Any

import zmq

from mgrpo.errors import ConfigError

Socket = zmq.Socket[bytes]
IPC_PATH_LIMIT = 107  # sun_path of Linux without its zero


def check_url(url: str) -> tuple[str, str]:
    """(scheme, rest) of a url; raises ConfigError when it is not inproc://, ipc:// or tcp://."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("inproc", "ipc", "tcp") or not rest:
        raise ConfigError(f"address {url!r} is not inproc://NAME, ipc://PATH or tcp://HOST:PORT")
    if scheme == "ipc" and len(os.fsencode(rest)) > IPC_PATH_LIMIT:
        raise ConfigError(
            f"ipc path {rest!r} has {len(os.fsencode(rest))} bytes, the limit is {IPC_PATH_LIMIT}"
        )
    if scheme == "tcp" and ":" not in rest:
        raise ConfigError(f"address {url!r} names no port")
    return scheme, rest


def is_private(url: str) -> bool:
    """True when what is said on `url` cannot leave this machine."""
    scheme, rest = check_url(url)
    if scheme != "tcp":
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Binding:
    """A socket bound to a url. `url` is the address clients connect to (port 0 is resolved)."""

    def __init__(self, socket: Socket, url: str) -> None:
        scheme, rest = check_url(url)
        self._lock: int | None = None
        self._lock_path = Path(rest + ".lock")
        if scheme == "ipc" and rest != "*":
            self._lock = self._take_lock()
        try:
            socket.bind(url)
        except zmq.ZMQError as error:
            self.release()
            raise ConfigError(f"cannot serve at {url}: {error.strerror or error}") from None
        self.url = url if scheme == "inproc" else last_endpoint(socket)

    def _take_lock(self) -> int:
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot serve at ipc://{self._lock_path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise ConfigError(
                f"cannot serve at {self._lock_path}: another process serves this address"
            ) from None
        return descriptor

    def release(self) -> None:
        """Give the address back. The lock file stays: removing it would race with the next server."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def last_endpoint(socket: Socket) -> str:
    endpoint: Any = socket.getsockopt(zmq.LAST_ENDPOINT)
    return bytes(endpoint).rstrip(b"\0").decode()
