"""Where the parts of a run listen, and how their links are protected."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Addresses:
    """ZeroMQ addresses: the store's, and for each role its trainer's (trajectories in, weights out). keys: folder of
    the keys on this machine, None for plain links; insecure: plain links may leave this machine. engines: for each
    policy the servers that the launcher starts here; weights: folder through which servers get weights."""

    store: str
    agents: Mapping[str, str]
    keys: Path | None = None
    insecure: bool = False
    engines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Path | None = None


def is_loopback(host: str) -> bool:
    """True for "localhost" and addresses of the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
