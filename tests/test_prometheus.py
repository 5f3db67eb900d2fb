"""A run's metrics for Prometheus: their names, their newest values, and the endpoint that Prometheus reads."""

from __future__ import annotations

import re
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mgrpo.errors import ConfigError
from mgrpo.store import reports
from mgrpo.store.prometheus import MetricsEndpoint
from mgrpo.store.records import Reported
from mgrpo.store.reports import NewestValues
from mgrpo.store.series import families, series_name
from mgrpo.store.server import StoreServer, check_metrics_port
from tests.store_kit import publish, run_params

HOSTILE = 'x"} 7\n# TYPE y counter\ny{a="\\'  # a name of a tool
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.mark.parametrize(
    ("metric", "name", "labels"),
    [
        ("main/perf/mfu", "mgrpo_perf_mfu", {"role": "main"}),
        ("main/tokens", "mgrpo_tokens", {"role": "main"}),
        ("sub/trained/reward/mean", "mgrpo_trained_reward_mean", {"role": "sub"}),
        ("rollout/tokens/sub", "mgrpo_rollout_tokens", {"role": "sub"}),
        ("rollout/perf/tok_per_s", "mgrpo_rollout_perf_tok_per_s", {}),
        ("rollout/tool/search/seconds_p95", "mgrpo_rollout_tool_seconds_p95", {"tool": "search"}),
        ("rollout/drop/by_calls_3_4", "mgrpo_rollout_drop_by_calls_3_4", {}),
        ("service/judge/tokens_in", "mgrpo_service_tokens_in", {"service": "judge"}),
        ("eval/gaia/avg", "mgrpo_eval_avg", {"set": "gaia"}),
        ("eval/gaia/level-2/avg", "mgrpo_eval_tag_avg", {"set": "gaia", "tag": "level-2"}),
        ("start_validation/valid", "mgrpo_start_validation_valid", {}),
        ("other/task/hits@5", "mgrpo_other_task_hits_5", {}),
    ],
)
def test_a_metric_has_a_name_that_prometheus_takes(metric: str, name: str, labels: dict[str, str]) -> None:
    """Roles, tools, services and sets are labels, so that one panel draws all of them."""
    assert series_name(metric, {"main", "sub"}) == (name, labels)
    assert re.fullmatch("[a-zA-Z_:][a-zA-Z0-9_:]*", name)


def test_names_that_become_one_are_one_series() -> None:
    """Prometheus refuses a page on which a series stands twice, or a family with two sets of labels."""
    values = {
        "main/task/a-b": 1.0,
        "main/task/a_b": 2.0,
        "task/a_b": 3.0,
        "store/groups": 4.0,
        "main/x": float("inf"),
    }
    found = list(families(values, {"main"}))
    assert [(f.name, f.labels, f.series) for f in found] == [("mgrpo_task_a_b", ("role",), {("main",): 1.0})]


def step_report(seq: int, step: int, **metrics: float) -> Reported:
    return Reported(seq, "trainer:main/x#1", "step", {"role": "main", "step": step, "metrics": metrics})


def test_the_newest_value_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report once, whichever were taken before; a malformed one is passed over; no more names than the bound."""
    monkeypatch.setattr(reports, "MAX_NAMES", 3)
    newest = NewestValues()
    seen = [step_report(1, 1, a=1.0, b=1.0), Reported(2, "x", "step", {"role": 3})]
    newest.take(seen)
    assert newest.values == {"a": 1.0, "b": 1.0} and newest.steps == {"main": 1}
    seen += [step_report(3, 2, a=2.0), Reported(4, "x", "eval", {})]
    newest.take(seen)
    newest.take(seen)
    assert newest.values == {"a": 2.0, "b": 1.0} and newest.steps == {"main": 2}
    newest.take([*seen, step_report(5, 3, c=1.0, d=1.0, a=3.0)])
    assert newest.values == {"a": 3.0, "b": 1.0, "c": 1.0} and newest.left_out == 1


def scraped(port: int) -> Series:
    """What Prometheus would read: value by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_endpoint_serves_what_trainers_report(tmp_path: Path) -> None:
    """From a report to the page, beside the store's own numbers; a restarted store knows the values again."""
    for life in (1, 2):
        with StoreServer("tcp://127.0.0.1:0", tmp_path / "s.db", run_params()) as store:
            endpoint = MetricsEndpoint(store.metrics, 0, newest=store.newest())
            try:
                if life == 1:
                    with publish(store.url, "main") as main, publish(store.url, "sub") as sub:
                        for role, client, mfu in (("main", main, 0.4), ("sub", sub, 0.3)):
                            metrics = {f"{role}/perf/mfu": mfu, f"{role}/reward/mean": 0.5}
                            metrics |= {f"rollout/tool/{HOSTILE}/calls": 2.0, f"{HOSTILE}/x": 1.0}
                            client.report("step", {"role": role, "step": 7, "metrics": metrics})
                wanted = ("mgrpo_perf_mfu", (("role", "sub"),))
                found: Series = {}
                for _ in range(1200):
                    found = scraped(endpoint.port)
                    if wanted in found:
                        break
                    threading.Event().wait(0.05)
                assert found[wanted] == 0.3
                assert found["mgrpo_perf_mfu", (("role", "main"),)] == 0.4
                assert found["mgrpo_reward_mean", (("role", "main"),)] == 0.5
                assert found["mgrpo_store_reported_step", (("role", "main"),)] == 7
                assert found["mgrpo_rollout_tool_calls", (("tool", HOSTILE),)] == 2.0
                assert found["mgrpo_store_workers", ()] == 0
                with pytest.raises(ConfigError, match=f"metrics port 127.0.0.1:{endpoint.port}: "):
                    check_metrics_port(endpoint.port)
            finally:
                endpoint.close()
