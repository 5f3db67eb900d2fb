"""docs/embedding.md: what every adapter keeps to. What each one computes is in the tests of its own."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

HOSTS = ("trl", "verl", "slime", "prime_rl")
PAGES = [ROOT / "docs" / "embedding" / f"{name}.md" for name in ("feed", *HOSTS)]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINES = 10
"""That a user needs for a host, at most."""

ALONE = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for host in {hosts}:
    importlib.import_module(f"mgrpo.integrations.{{host}}")
print("imported")
"""


def test_adapters_are_imported_without_their_hosts() -> None:
    """With mgrpo's own dependencies alone."""
    missing = {
        *HOSTS,
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "datasets",
        "pandas",
        "ray",
        "tensordict",
    }
    code = ALONE.format(missing=missing, hosts=HOSTS)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert ran.stdout == "imported\n", ran.stderr


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_user_needs_few_lines(page: Path) -> None:
    """Every page has a block, which the tests of its host run, and none has more lines than promised."""
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for block in blocks:
        ast.parse(block)
        lines = [line for line in block.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(lines) <= LINES, f"{len(lines)} lines:\n{block}"


@pytest.mark.parametrize("host", HOSTS)
def test_adapters_use_public_names(host: str) -> None:
    """What an adapter can do a user can do: of mgrpo it imports what `mgrpo` itself lists, errors and helpers of its
    own package."""
    path = ROOT / "mgrpo" / "integrations" / f"{host}.py"
    private = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("mgrpo.")
        and not (node.module or "").startswith(("mgrpo.integrations", "mgrpo.errors"))
    ]
    assert not private
