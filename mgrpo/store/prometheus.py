"""The store's numbers and the newest metrics of the run for Prometheus, over HTTP on a port of their own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from mgrpo.errors import ConfigError
from mgrpo.store.reports import NewestValues
from mgrpo.store.series import families


class _Collector:
    def __init__(self, stats: Callable[[], Mapping[str, Any]], newest: NewestValues) -> None:
        self._stats, self._newest = stats, newest

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        yield from self._of_store(stats)
        yield from self._of_run(stats.get("roles", {}))

    def _of_run(self, roles: Mapping[str, Any]) -> Iterator[Any]:
        newest = self._newest
        steps = GaugeMetricFamily(
            "mgrpo_store_reported_step", "Steps of the newest report of a role", labels=["role"]
        )
        for role, step in newest.steps.items():
            steps.add_metric([role], step)
        yield steps
        for family in families(newest.values, {*roles, *newest.steps}):
            gauge = GaugeMetricFamily(
                family.name, "Newest value; docs/metrics.md says of what", labels=family.labels
            )
            for values, value in family.series.items():
                gauge.add_metric(values, value)
            yield gauge
        yield GaugeMetricFamily(
            "mgrpo_store_values_left_out", "Values of too many metrics", value=newest.left_out
        )

    def _of_store(self, stats: Mapping[str, Any]) -> Iterator[Any]:
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


def check_port(port: int, address: str = "127.0.0.1") -> None:
    """Raise ConfigError where nothing can be served at the port, as when it is taken."""
    try:
        socket.create_server((address, port)).close()
    except OSError as error:
        raise _refused(port, address, error) from None


def _refused(port: int, address: str, error: OSError) -> ConfigError:
    return ConfigError(f"metrics port {address}:{port}: {error.strerror}")


class MetricsEndpoint:
    """Serves `stats`, and the newest values of a run's metrics, at http://address:port/metrics until close(). Raises
    ConfigError when the port is taken."""

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Any]],
        port: int,
        address: str = "127.0.0.1",
        newest: NewestValues | None = None,
    ) -> None:
        registry = CollectorRegistry()
        registry.register(_Collector(stats, newest or NewestValues()))
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise _refused(port, address, error) from None
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
