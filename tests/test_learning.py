"""The demo in short: two agents with weights of their own learn together, and nothing but learning explains it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import ROOT, leftovers, records, summary, train
from tests.trace_check import check_trace, tools_of_sub_agents

ATLAS = ROOT / "examples" / "atlas" / "atlas.toml"
SHORT = (
    "seed=1",
    "trainer.steps=80",
    "agents.main.sft.steps=500",
    "agents.sub.sft.steps=700",
    "eval.every=20",
    "eval.heldout=200",
    "eval.start_validation=100",
)


@pytest.mark.timeout(1800)
def test_two_agents_learn_together(tmp_path: Path) -> None:
    """From a valid start, 80 steps lift held-out accuracy by far more than chance could, for both ways of decoding; the
    trainer's log-probs stay the sampler's, and no token is ever re-tokenised. The trace of the run holds each of its
    rollouts, turns, tool calls, claims, steps and weight updates once."""
    out = tmp_path / "run"
    train(ATLAS, out, *SHORT, timeout=1750)
    data = summary(out)
    assert data["valid"], data["start_validation"]
    before, final = data["heldout"]["start"], data["heldout"]["final"]
    assert before["sampled"] < 0.25 and before["greedy"] < 0.40
    assert final["sampled"] >= before["sampled"] + 0.3
    assert final["greedy"] >= before["greedy"] + 0.3
    rows = records(out)
    for role in ("main", "sub"):
        differences = [r[name] for r in rows if (name := f"{role}/policy/logprob_diff_max") in r]
        assert len(differences) >= 20 and max(differences) < 1e-4
    assert data["retokenization_mismatch"] == 0
    assert leftovers(out) == []
    assert check_trace(out, tools_of_sub_agents).counts["step"] == 2 * 80
