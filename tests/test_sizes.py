"""A file answers one question, a function does one thing: bounds that keep it so."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 450, 80, 140
FOLDERS = ("mgrpo", "kernels", "csrc", "tests", "tests_gateway", "tests_vllm", "bench", "examples", "docs")


def sources(*suffixes: str) -> list[Path]:
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return sorted(p for p in found if not any(parent.is_symlink() for parent in p.parents))


def test_no_file_is_long() -> None:
    """Python, C++ and the page's scripts."""
    lengths = {
        p: len(p.read_text().splitlines()) for p in sources(".py", ".pyi", ".cpp", ".hpp", ".js", ".css")
    }
    assert not {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > FILE_LINES}


def test_no_function_is_long() -> None:
    """A kernel, which has its argument list and no helpers to call, may be longer."""
    long = {}
    for path in sources(".py"):
        most = KERNEL_LINES if path.parent.name == "kernels" else FUNCTION_LINES
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > most:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert not long
