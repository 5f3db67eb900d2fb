"""The layers of the house: a module may import only what stands before it in this list, or its own package."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = [
    *("_C", "kernels"),
    *("errors", "files", "types", "waiting", "addresses", "plugins", "sinks", "metrics", "config"),
    *("losses",),
    *("ops", "alignment", "credit", "algorithms", "assignment"),
    *("batcher", "transport"),
    *("weights", "model", "trajectory_log", "store", "record"),
    *("profiling",),
    *("services",),
    *("engines", "environments", "trainers"),
    *("tools", "scoring", "benchmarks"),
    *("gateway",),
    *("planning",),
    *("pipeline",),
    *("tasks",),
    *("trace",),
    *("run", "view"),
    *("integrations",),
    *("cli", "__main__"),
    *("integrations",),
]
LEVEL = {name: level for level, name in enumerate(ORDER)}


def imported(path: Path) -> set[str]:
    """First component below mgrpo of every mgrpo module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "mgrpo" else [module]
        found |= {name.split(".")[1] for name in names if name.startswith("mgrpo.")}
    return found


def test_imports_point_downwards() -> None:
    """No file imports a module that stands at or after its own package in the order."""
    wrong = []
    for path in sorted((ROOT / "mgrpo").rglob("*.py")):
        own = path.relative_to(ROOT / "mgrpo").parts[0].removesuffix(".py")
        if own in ("kernels", "__init__"):
            continue
        assert own in LEVEL, f"mgrpo/{own} has no place: add it to the order above"
        wrong += [
            f"{path.relative_to(ROOT)} ({own}) imports mgrpo.{other}"
            for other in imported(path) - {own, "__version__"}
            if LEVEL.get(other, len(ORDER)) >= LEVEL[own]
        ]
    assert not wrong, "\n".join(wrong)


def test_kernels_stand_alone() -> None:
    """Device code never imports mgrpo, and the folder is no package: `import kernels` stays free for others."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(
            isinstance(n, ast.ImportFrom | ast.Import) and "mgrpo" in ast.unparse(n)
            for n in ast.walk(ast.parse(path.read_text()))
        ), path
    assert (ROOT / "mgrpo" / "kernels").is_symlink()


def test_core_is_free_of_python_and_torch() -> None:
    """Only the bindings (bindings.cpp, bind_*.cpp) may know the interpreter."""
    for path in (ROOT / "csrc").glob("*.[ch]pp"):
        text = path.read_text()
        assert "torch/" not in text, path
        if path.name != "bindings.cpp" and not path.name.startswith("bind_"):
            assert "Python.h" not in text and "pybind11" not in text, path
