"""What Prometheus calls a run's metrics:

    main/perf/mfu                    mgrpo_perf_mfu{role="main"}
    rollout/tokens/main              mgrpo_rollout_tokens{role="main"}
    rollout/tool/search/seconds      mgrpo_rollout_tool_seconds{tool="search"}
    service/judge/calls              mgrpo_service_calls{service="judge"}
    eval/gaia/avg                    mgrpo_eval_avg{set="gaia"}
    eval/gaia/level-2/avg            mgrpo_eval_tag_avg{set="gaia",tag="level-2"}

and any other by its name, with _ for what is neither a letter nor a digit. A family has the same labels wherever it
appears, and a series appears once: of two names that become one, the first in order counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

OWN = "mgrpo_store"
"""Families of the store itself, which no metric may be called."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of gauges: its series by the values of its labels."""

    name: str
    labels: tuple[str, ...]
    series: dict[tuple[str, ...], float] = field(default_factory=dict)


def families(values: Mapping[str, float], roles: Collection[str]) -> Iterator[Family]:
    """Of the newest values by their names in metrics.jsonl. roles: those that train."""
    found: dict[str, Family] = {}
    for metric in sorted(values):
        name, labels = series_name(metric, roles)
        family = found.setdefault(name, Family(name, tuple(labels)))
        if family.labels == tuple(labels) and not name.startswith(OWN) and math.isfinite(values[metric]):
            family.series.setdefault(tuple(labels.values()), values[metric])
    yield from (family for family in found.values() if family.series)


def series_name(metric: str, roles: Collection[str]) -> tuple[str, dict[str, str]]:
    """Family and labels of a metric."""
    parts, labels = metric.split("/"), {}
    if parts[0] in roles and len(parts) > 1:
        labels["role"] = parts.pop(0)
    elif parts[:2] == ["rollout", "tokens"] and len(parts) == 3:
        labels["role"] = parts.pop(2)
    elif parts[:2] == ["rollout", "tool"] and len(parts) > 3:
        labels["tool"] = "/".join(parts[2:-1])
        parts = [*parts[:2], parts[-1]]
    elif parts[0] == "service" and len(parts) == 3:
        labels["service"] = parts.pop(1)
    elif parts[0] == "eval" and len(parts) > 2:
        labels["set"] = parts.pop(1)
        if len(parts) > 2:
            labels["tag"] = "/".join(parts[1:-1])
            parts = ["eval", "tag", parts[-1]]
    return "mgrpo_" + re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(parts)), labels
