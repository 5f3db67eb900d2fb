"""A whole run whose rollouts a program makes through the gateway: it trains, and replays bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgrpo.cli.replay import replay_run
from mgrpo.record.reader import Recording
from tests.runs import ROOT, leftovers, records, summary, train
from tests.span_kit import check_spans

CONFIG = ROOT / "tests" / "harness.toml"


def test_a_run_through_the_gateway_trains_and_replays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps: every rollout is there in its first attempt with both sub-agents, what
    each step did can be rebuilt to the last bit, and nothing is left running."""
    out = tmp_path / "run"
    train(CONFIG, out)
    assert summary(out)["finished"] and leftovers(out) == []
    reported = [record for record in records(out) if "rollout/failed" in record]
    assert reported and all(record["rollout/failed"] == 0 for record in reported)
    assert {"rollout/task/gateway_turns", "sub/reward/format"} <= {name for r in records(out) for name in r}
    rollouts = [r.head for r in Recording([out]).rollouts.values() if r.head.split == "train"]
    assert len(rollouts) >= 3 * 4 * 4 and {r.d_k["sub"] for r in rollouts} == {2}
    check_spans(out, ("main", "sub"), 3)
    capsys.readouterr()
    replay_run(out, [], sample=12, seed=1)
    assert capsys.readouterr().out.splitlines()[-1] == "12 rollouts: every stage bit-equal"
