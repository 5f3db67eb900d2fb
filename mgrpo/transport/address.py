"""Addresses: which urls are allowed, and binding that fails loudly.

libzmq traps handled here: binding an ipc path that another process serves silently steals it (a lock file
beside it refuses that), and plain tcp beyond this machine would be readable and writable by anyone.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
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
    if scheme == "tcp":
        _check_tcp(url, rest)
    return scheme, rest


def _check_tcp(url: str, rest: str) -> None:
    host, _, port = rest.rpartition(":")
    if not host or not port:
        raise ConfigError(f"address {url!r} names no {'port' if host or ':' not in rest else 'host'}")
    if port != "*" and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"address {url!r}: port {port!r} is not a number up to 65535")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"address {url!r}: an IPv6 address stands in brackets, as in tcp://[fd00::1]:5600")
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError as error:
            raise ConfigError(f"address {url!r}: {error}") from None


def host_of(url: str) -> str:
    """The host of a tcp url, without the brackets of IPv6."""
    return check_url(url)[1].rpartition(":")[0].strip("[]")


def needs_ipv6(url: str) -> bool:
    """True when a socket must speak IPv6 for `url`: an IPv6 address, a name that has no IPv4 address, or all
    interfaces ("*"), which are then reached over both. A name that has both kinds means its IPv4 address, on either
    side of a link."""
    if check_url(url)[0] != "tcp":
        return False
    host = host_of(url)
    if host == "*":
        return socket.has_dualstack_ipv6()
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        pass
    try:
        found = {family for family, *_ in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # an interface, or a name that is not known yet: libzmq says what is wrong with it
    return socket.AF_INET6 in found and socket.AF_INET not in found


def is_private(url: str) -> bool:
    """True when what is said on `url` cannot leave this machine."""
    if check_url(url)[0] != "tcp":
        return True
    host = host_of(url)
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Binding:
    """A socket bound to a url. `url` is the address clients connect to (port 0 is resolved)."""

    def __init__(self, server: Socket, url: str) -> None:
        scheme, rest = check_url(url)
        self._lock: int | None = None
        self._lock_path = Path(rest + ".lock")
        if scheme == "ipc" and rest != "*":
            self._lock = self._take_lock()
        try:
            server.setsockopt(zmq.IPV6, needs_ipv6(url))
            server.bind(url)
        except zmq.ZMQError as error:
            self.release()
            raise ConfigError(f"cannot serve at {url}: {error.strerror or error}") from None
        self.url = url if scheme == "inproc" else last_endpoint(server)

    def _take_lock(self) -> int:
        # flock itself: filelock makes folders that are missing, and takes a file system's ENOENT for "held by another".
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


def last_endpoint(server: Socket) -> str:
    endpoint: Any = server.getsockopt(zmq.LAST_ENDPOINT)
    return bytes(endpoint).rstrip(b"\0").decode()
