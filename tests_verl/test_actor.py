"""verl's own actor worker takes a step on the CPU: the step that mgrpo's weighted loss asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_actor_step_is_the_weighted_step(tmp_path: Path) -> None:
    """Engine, micro-batches of one row, loss function, clipping of the gradient and optimizer are verl's; ours is a
    Hugging Face model, linear_grpo_loss and SGD."""
    modes = ("token-mean", "seq-mean-token-mean")
    command = [sys.executable, str(HERE / "actor_step.py"), str(tmp_path), *modes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(modes)
    for mode, got in found.items():
        assert got["moved"] > 1e-4, (mode, got)
        assert got["loss_gap"] <= 5e-7 * max(1.0, abs(got["loss"])), (mode, got)
        assert got["norm_gap"] <= 1e-6 * got["norm"], (mode, got)
        assert got["weight_gap"] <= 1e-5 * got["moved"], (mode, got)
