"""The Grafana dashboard: every series that it asks for is one that the endpoint serves for what runs report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.core import Metric

from mgrpo.store.prometheus import _Collector
from mgrpo.store.reports import NewestValues
from mgrpo.store.series import series_name
from tests.runs import ROOT

FOLDER = ROOT / "examples" / "grafana"
ROLES = ("main", "sub")
NUMBERS = {"ready": 0, "leased": 0, "applied": 0, "skipped": 0, "surplus": 0}
STATE = {"epoch": 1, "version": 1, "step": 1, "checkpoint_step": 1}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "mgrpo.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [p for panel in dashboard()["panels"] for p in (panel, *panel.get("panels", ()))]


def documented() -> set[str]:
    """Names of metrics.jsonl as docs/metrics.md has them, with something in each place that it leaves open."""
    first = [
        line.split("|")[1]
        for line in (ROOT / "docs" / "metrics.md").read_text().splitlines()
        if "`" in line and line[0] == "|"
    ]
    names = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    return {re.sub(r"<(role|agent)>", "main", name.replace("*", "main", 1)) for name in names}


def served() -> dict[str, set[str]]:
    """Labels of every family by its name: of documented metrics, and of the page of a store with a run."""
    found: dict[str, set[str]] = {}
    for metric in documented():
        name, labels = series_name(re.sub(r"<(\w+)>", r"\1", metric), ROLES)
        found.setdefault(name, set(labels))
    newest = NewestValues()
    newest.steps = {"main": 1}
    stats = {"roles": {"main": NUMBERS | STATE}, "handled": {"claim": 1}, "refused": {"HELD": 1}}
    page: list[Metric] = list(_Collector(lambda: stats, newest).collect())
    for family in page:
        for sample in family.samples:
            found[sample.name] = set(sample.labels)
    return found


def asked() -> Iterator[tuple[str, str, str]]:
    """Panel, name and what stands between braces, of each series in the dashboard."""
    for panel in panels():
        for target in panel.get("targets", ()):
            for name, labels in re.findall(r"\b(mgrpo_\w+)(\{[^}]*\})?", target["expr"]):
                yield panel["title"], name, labels + target["legendFormat"]


def test_every_series_is_served() -> None:
    """By its name, and with the labels that panels select by and write into legends."""
    families = served()
    series = list(asked())
    assert len({name for _, name, _ in series}) > 40
    for title, name, text in series:
        assert name in families, f"panel {title!r} asks for {name}, which is no metric of docs/metrics.md"
        labels = {*re.findall(r"(\w+)=~?\"", text), *re.findall(r"\{\{(\w+)\}\}", text)}
        assert labels <= families[name] | {"run"}, f"panel {title!r}: {name} has the labels {families[name]}"


def test_a_wrong_name_would_be_seen() -> None:
    """The list of names that is served is no list of everything."""
    families = served()
    assert "mgrpo_perf_mfu" in families and families["mgrpo_rollout_tool_seconds_p95"] == {"tool"}
    assert not {"mgrpo_perf_mfu_walls", "mgrpo_main_perf_mfu", "mgrpo_store_role_total"} & families.keys()


def test_it_can_be_imported() -> None:
    """Numbers of panels are unique, they do not overlap, and every one asks the data source that is chosen."""
    found = dashboard()
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids)) > 20
    variables = {variable["name"]: variable["type"] for variable in found["templating"]["list"]}
    assert variables == {"datasource": "datasource", "role": "query"}
    places: set[tuple[int, int]] = set()
    for panel in panels():
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        here = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not here & places, panel["title"]
        places |= here


@pytest.mark.parametrize("row", ["Rewards", "Where the time goes", "Utilisation and memory", "Store"])
def test_rows_say_what_they_are_about(row: str) -> None:
    assert [panel["title"] for panel in panels() if panel["type"] == "row"].count(row) == 1


def test_prometheus_reads_the_port_of_the_readme() -> None:
    """The target of prometheus.yml is the port that the README has the run serve at."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    assert f"store.metrics_port={target.rpartition(':')[2]}" in Path(FOLDER / "README.md").read_text()
