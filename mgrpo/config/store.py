"""The store and the links between servers."""

from __future__ import annotations

from pydantic import Field

from mgrpo.config.settings import MAX_SECONDS, Settings


class StoreConfig(Settings):
    """The shared store."""

    url: str | None = None
    """Where the store listens, e.g. "tcp://10.0.0.1:5600". Unset: a local socket of the run."""
    timeout: float = Field(60.0, gt=0, le=MAX_SECONDS)
    """Seconds that any call may take before it fails with a named error."""
    idle_timeout: float = Field(1800.0, gt=0, le=MAX_SECONDS)
    """Seconds that a trainer or worker waits for its next work. A trainer does not count the time in which workers have
    groups in hand, which is bounded by group_timeout, and nobody that in which a worker waits for a service that is
    down, which is bounded by the service's max_outage."""
    group_timeout: float = Field(1800.0, gt=0, le=MAX_SECONDS)
    """Seconds without a finished rollout after which the store closes a group: it is trained on with the rollouts it
    has (at least half of them and two), or dropped, and its worker goes on with the next one. Must exceed the longest
    rollout. The time in which its worker waits for a service that is down does not count."""
    lease: float = Field(60.0, gt=0, le=MAX_SECONDS)
    """Seconds after which groups that a trainer has claimed are handed out again unless it renews its claim, which it
    does three times in that time."""
    heartbeat_timeout: float = Field(30.0, gt=0, le=MAX_SECONDS)
    """Seconds without a sign of life after which a rollout worker counts as dead, and the others take its groups over.
    A worker gives one four times in that time."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port on this machine (127.0.0.1) at which Prometheus reads the run's metrics and the store's own numbers. Unset:
    none."""


class LinkConfig(Settings):
    """Protection of the links between servers. Links within one machine need none."""

    keys: str | None = None
    """Folder of the keys on each server: server.secret and allowed/ where something listens, and main.key, sub.key,
    worker.key, launcher.key for what runs there (`mgrpo keys add NAME --role ROLE`). Unset: plain links."""
    insecure: bool = False
    """Allow plain links beyond this machine. Anyone who reaches the ports can then read and write the run."""
