"""The store's numbers for Prometheus, over HTTP on a port of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from mgrpo.errors import ConfigError


class _Collector:
    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        groups = GaugeMetricFamily("mgrpo_store_groups", "Groups by state", labels=["state"])
        for state in ("open", "sealed", "dropped"):
            groups.add_metric([state], stats.get(state, 0))
        yield groups
        deliveries = GaugeMetricFamily(
            "mgrpo_store_deliveries", "Groups by role and state", labels=["role", "state"]
        )
        numbers = GaugeMetricFamily(
            "mgrpo_store_role", "Version, step and epoch of a role", labels=["role", "what"]
        )
        for role, values in stats.get("roles", {}).items():
            for name in ("ready", "leased", "applied", "skipped", "surplus"):
                deliveries.add_metric([role, name], values[name])
            for name in ("epoch", "version", "step", "checkpoint_step"):
                numbers.add_metric([role, name], -1 if values[name] is None else values[name])
        yield GaugeMetricFamily(
            "mgrpo_store_workers", "Rollout workers that are alive", value=len(stats.get("workers", ()))
        )
        yield deliveries
        yield numbers
        for name, what, label in (
            ("handled", "Requests by method", "method"),
            ("refused", "Refusals by code", "code"),
        ):
            counter = CounterMetricFamily(f"mgrpo_store_{name}", what, labels=[label])
            for key, n in stats.get(name, {}).items():
                counter.add_metric([key], n)
            yield counter
        for name, what in (("commits", "Durable commits"), ("rows", "Rows written")):
            yield CounterMetricFamily(f"mgrpo_store_{name}", what, value=stats.get(name, 0))
        yield GaugeMetricFamily(
            "mgrpo_store_wal_bytes", "Size of the write-ahead log", value=stats.get("wal_bytes", 0)
        )


class MetricsEndpoint:
    """Serves `stats` at http://address:port/metrics until close(). Raises ConfigError when the port is taken."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]], port: int, address: str = "127.0.0.1") -> None:
        registry = CollectorRegistry()
        registry.register(_Collector(stats))
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise ConfigError(f"metrics port {address}:{port}: {error.strerror}") from None
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
