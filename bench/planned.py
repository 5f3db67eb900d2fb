"""What `mgrpo plan` predicts for a training step that a bench has measured."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 90.0  # seconds
CONFIG = """
[agents.main]
model = "{model}"
max_length = 1024
reward = {{ correct = 1.0 }}
policy = {policy}

[agents.sub]
max_length = 32
reward = {{ outcome = 1.0 }}

[trainer]
micro_batch = {micro_batch}
"""


def planned_bytes(model: Any, policy: dict[str, Any], micro_batch: int) -> float | None:
    """Peak bytes of one rank's device in a step; None, with a line that says why, where the command does not answer.

    model: a transformers model, whose configuration alone is looked at; policy: the agent's settings; micro_batch:
    its tokens, padded ones unless attention is packed; the plan fills it with trajectories of 1024.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.config.save_pretrained(folder / "model")
        path = folder / "run.toml"
        path.write_text(CONFIG.format(model=folder / "model", policy=inline(policy), micro_batch=micro_batch))
        command = [sys.executable, "-m", "mgrpo", "plan", str(path), "--json", "--no-suggestions"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            print(f"mgrpo plan did not answer within {LIMIT:g} s")
            return None
        if done.returncode:
            print(f"mgrpo plan did not answer: {done.stderr.strip().splitlines()[-1:]}")
            return None
        return peak_in(json.loads(done.stdout))


def peak_in(page: dict[str, Any]) -> float:
    """The peak of a rank of the first agent: of its tensors, as the allocator counts them."""
    return float(page["agents"][0]["memory"]["peak"])


def inline(values: dict[str, Any]) -> str:
    """A TOML inline table."""
    parts = (
        f"{key} = {inline(value) if isinstance(value, dict) else json.dumps(value)}"
        for key, value in values.items()
    )
    return "{ " + ", ".join(parts) + " }"
