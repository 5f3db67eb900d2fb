"""The core under sanitizers: its C++ tests, and the batcher's and the trajectory log's Python tests on a sanitized
module, since the border between the two is where memory is shared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
BATCHER = ("batcher", "batcher_refusals", "batcher_buffers", "batcher_border")
SHARED = ("prefix_tree", "shared_layout")
BORDER = [f"tests/test_{name}.py" for name in (*BATCHER, *SHARED, "alignment", "trajectory_log")]


def run(*command: str, **env: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(preset: str, *options: str) -> None:
    missing = [tool for tool in ("cmake", "ctest", "ninja") if not shutil.which(tool, path=ENV["PATH"])]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    run("cmake", "--preset", preset, *options)
    run("cmake", "--build", "--preset", preset)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a first build on a busy machine
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_core_is_clean(preset: str) -> None:
    """No leak, no undefined behaviour, no data race in the arena, packer, batcher and a short soak."""
    build(preset)
    assert "100% tests passed" in run("ctest", "--preset", preset)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_border_between_python_and_the_core_is_clean() -> None:
    """No access out of bounds or out of alignment while numpy's memory goes in and out of the core."""
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    build("asan-python", f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}")
    (core,) = (ROOT / "build" / "asan-python").glob("_C*.so")
    # The interpreter is not sanitized: the runtime comes before everything else, and libstdc++ with it, whose
    # exceptions it intercepts. The interpreter's own leaks are not looked for.
    preload = [run("gcc", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    output = run(
        *(sys.executable, "-m", "pytest", "-x", "-p", "tests.sanitized_core", *BORDER),
        LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        MGRPO_SANITIZED_CORE=str(core),
    )
    assert f"core: {core}" in output
