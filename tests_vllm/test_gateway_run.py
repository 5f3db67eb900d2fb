"""A whole run of a program with two agents, through the gateway, sampled by a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgrpo.cli.replay import replay_run
from mgrpo.record.reader import Recording
from tests.runs import leftovers, records, summary, train
from tests_vllm.kit import ROOT, short_model

PYTHON = ROOT / ".venv-vllm/bin/python"
pytestmark = pytest.mark.timeout(900)
CONFIG = """
seed = 1

[task]
name = "tests_vllm.team:FactTask"

[agents.main]
model = "{model}"
max_length = 160
reward = {{ gate = false, correct = 1.0 }}
optimizer = {{ lr = 1e-4 }}
policy = {{ dtype = "bfloat16", lora = {{ rank = 4, alpha = 8.0 }} }}
engine = {{ type = "vllm", sync = "lora", dtype = "bfloat16", timeout = 300.0, python = "{python}" }}

[agents.sub]
model = "{model}"
max_length = 128
d_max = 2
reward = {{ gate = false, outcome = 1.0 }}
optimizer = {{ lr = 1e-4 }}
policy = {{ dtype = "bfloat16", lora = {{ rank = 4, alpha = 8.0 }} }}
engine = {{ shared_with = "main" }}

[trainer]
steps = 3
questions = 2
group_size = 4
minibatches = 1
old_logprobs = "recompute"

[eval]
every = 10
validation = 1
heldout = 1
start_validation = 0
"""


def test_two_agents_train_through_the_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps of two policies on one server: no rollout fails, each has its two parallel sub-agents, tokens are of
    the step's own weights, the trainer's log-probs are the server's to bfloat16's precision, and every stage of a
    sample of rollouts can be rebuilt to the last bit."""
    config, out = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(CONFIG.format(model=short_model(tmp_path / "model"), python=PYTHON))
    output = train(config, out, timeout=850)
    assert summary(out)["finished"], output
    rows = [row for row in records(out) if "sub/reward/mean" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sub/staleness/max"] == 0
        assert 0 < row["sub/policy/mismatch_kl"] < 1e-2
    counts = [row for row in records(out) if "rollout/task/gateway_turns" in row]
    assert counts and {row["rollout/task/gateway_turns"] for row in counts} == {4}
    assert all(row["rollout/failed"] == 0 for row in records(out) if "rollout/failed" in row)
    played = [r.head for r in Recording([out]).rollouts.values() if r.head.split == "train"]
    assert len(played) == 3 * 2 * 4 and {head.d_k["sub"] for head in played} == {2}
    capsys.readouterr()
    replay_run(out, [], sample=6, seed=1)
    assert capsys.readouterr().out.splitlines()[-1] == "6 rollouts: every stage bit-equal"
    assert leftovers(out) == [] and not (out / "weights").exists()
