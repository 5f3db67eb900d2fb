"""bench/gpu.sh without a GPU: its steps run with tiny sizes, and one JSON holds every table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_command_for_a_gpu_host_goes_through(tmp_path: Path) -> None:
    """Kernels, a step trained whole and one of adapters, and two ranks: nothing fails, each leaves its figures."""
    target = tmp_path / "all.json"
    environment = {**os.environ, "DEVICE": "cpu", "JSON": str(target), "PYTHON": sys.executable}
    environment |= {"SECONDS_LIMIT": "900", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=950
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(target.read_text())
    assert found["failed"] == []
    for name in ("group_advantage", "step_tiny", "step_tiny_lora", "two_ranks"):
        assert found[name]["figures"], name
        assert all(f["value"] == f["value"] for f in found[name]["figures"]), name
    for name in ("step_tiny", "step_tiny_lora"):
        work = [f["value"] for f in found[name]["figures"] if f["item"].startswith("TFLOP/s")]
        assert work and work[0] > 0, f"{name} trained on nothing"
    planned = [f for f in found["step_tiny"]["figures"] if "mgrpo plan" in f["item"]]
    assert planned and planned[0]["value"] > 0
