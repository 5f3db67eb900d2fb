"""A whole run whose agents are sampled by a real server that the launcher starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import leftovers, records, summary, train
from tests_vllm.kit import MODEL, ROOT, short_model

pytestmark = pytest.mark.timeout(900)
CONFIG = """
seed = 1

[task]
name = "tests_vllm.echo:EchoTask"

[agents.main]
model = "{model}"
max_length = 128
reward = {{ correct = 1.0 }}
optimizer = {{ lr = 1e-5 }}
policy = {{ {policy} }}
engine = {{ type = "vllm", sync = "{sync}", dtype = "bfloat16", timeout = 300.0, python = "{python}" }}

[agents.sub]
shares = "main"
max_length = 128
reward = {{ outcome = 0.5, expert = 0.5 }}
optimizer = {{ lr = 1e-5 }}

[trainer]
steps = 3
questions = 2
group_size = 4
minibatches = 1
old_logprobs = "recompute"

[rollout]
workers = 2

[eval]
every = 10
validation = 1
heldout = 1
start_validation = 1
"""


@pytest.mark.parametrize(
    ("sync", "policy", "whole"),
    [
        ("fs", "last_layers = 2", False),
        ("patch", "last_layers = 2", False),
        ("gloo", "last_layers = 2", True),  # no other test sends SmolLM2 itself this way
        ("lora", 'lora = { rank = 4, alpha = 8.0, targets = ["q_proj", "v_proj"] }', False),
    ],
)
def test_a_run_samples_from_the_server_it_starts(tmp_path: Path, sync: str, policy: str, whole: bool) -> None:
    """Three steps, two workers on one server: every token is of the step's own weights, the trainer's log-probs are the
    server's to bfloat16's precision, and neither a process nor a version is left."""
    config, out = tmp_path / "run.toml", tmp_path / "run"
    python = ROOT / ".venv-vllm/bin/python"
    model = MODEL if whole else short_model(tmp_path / "model")
    config.write_text(CONFIG.format(model=model, python=python, sync=sync, policy=policy))
    output = train(config, out, timeout=850)
    assert summary(out)["finished"], output
    rows = [r for r in records(out) if "main/reward/mean" in r]
    assert [r["step"] for r in rows] == [1, 2, 3]
    for row in rows:
        print(
            {
                name.removeprefix("main/"): value
                for name, value in row.items()
                if "mismatch" in name or "stale" in name
            }
        )
        assert row["main/staleness/max"] == 0
        assert 0 < row["main/policy/mismatch_kl"] < 1e-2
    assert leftovers(out) == [] and not (out / "weights").exists()
