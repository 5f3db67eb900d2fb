"""The C++ tests of tests/cpp, built and run under the sanitizers of CMakePresets.json."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(*command: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # a first build on a busy machine
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_core_is_clean(preset: str) -> None:
    """No leak, no undefined behaviour, no data race in the arena, packer, batcher and a short soak."""
    missing = [tool for tool in ("cmake", "ctest", "ninja") if not shutil.which(tool, path=ENV["PATH"])]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    run("cmake", "--preset", preset)
    run("cmake", "--build", "--preset", preset)
    assert "100% tests passed" in run("ctest", "--preset", preset)
