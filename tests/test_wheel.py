"""Packaging: a wheel holds the package and nothing beside it, works alone, and imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = """
import sys, mgrpo, mgrpo._C, mgrpo.config, mgrpo.cli
heavy = {"torch", "transformers", "triton", "vllm", "zmq"} & set(sys.modules)
assert not heavy, f"import mgrpo loads {heavy}"
print(mgrpo.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as an installer would, with the build folder of the editable install, so little is compiled twice."""
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600, stdin=subprocess.DEVNULL, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_installs_only_mgrpo(wheel: Path) -> None:
    """No other top-level name (a module `kernels` would shadow another project's); sources, core and marker."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops == {"mgrpo", next(t for t in tops if t.endswith(".dist-info"))}
    assert any(n.startswith("mgrpo/_C.") and n.endswith(".so") for n in names)
    assert {"mgrpo/py.typed", "mgrpo/_C.pyi", "mgrpo/pipeline/trainer_loop.py"} <= set(names)
    kernels = {f"mgrpo/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert kernels and kernels <= set(names)
    page = {f"mgrpo/view/page/{p.name}" for p in (ROOT / "mgrpo" / "view" / "page").iterdir()}
    assert len(page) >= 8 and page <= set(names)
    template = {str(p.relative_to(ROOT)) for p in (ROOT / "mgrpo" / "cli" / "template").rglob("*.txt")}
    assert len(template) == 6 and template <= set(names)


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked into an empty folder and imported from elsewhere, it finds its own core, and `import kernels` fails."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # -S: no .pth file of the editable install; installed dependencies come by path.
    paths = [str(tmp_path / "site"), sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done, other = (
        subprocess.run(
            [sys.executable, "-S", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        for code in (LIGHT, "import kernels")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "ModuleNotFoundError" in other.stderr


def test_the_editable_install_is_light() -> None:
    """import mgrpo, the config and the command line need neither torch nor transformers."""
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd="/", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "mgrpo"


def test_sdist_carries_the_kernels(tmp_path: Path) -> None:
    """The device code is there under both names (the symlink is followed); nothing of a working copy comes along."""
    command = [
        sys.executable,
        "-m",
        "build",
        "-q",
        "--sdist",
        "--no-isolation",
        "-o",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if "/" in m.name}
    assert {
        "csrc/bindings.cpp",
        "CMakeLists.txt",
        "kernels/grpo_loss.py",
        "mgrpo/kernels/grpo_loss.py",
    } <= names
    assert not any(n.startswith(("runs/", ".venv/", "build/")) for n in names)
