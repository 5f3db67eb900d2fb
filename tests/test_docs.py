"""The documents speak of what is there: every file and every command that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    p.relative_to(ROOT) for p in (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))
) + sorted(
    p.relative_to(ROOT) for folder in ("docs", "examples", "bench") for p in (ROOT / folder).rglob("*.md")
)
FOLDERS = ("mgrpo", "csrc", "kernels", "tests", "tests_gateway", "tests_vllm", "bench", "examples", "docs")
PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./*<>{{}},-]+)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
MODULE = re.compile(r"(?<![\w./])python -m ((?:bench|tests)(?:\.\w+)+)")


def expanded(text: str) -> list[str]:
    """`a/{b,c}.py` as two names; one with a placeholder or a pattern is none."""
    text = text.rstrip(".,:;")
    if any(mark in text for mark in "*<>"):
        return []
    match = re.search(r"{([^{}]*)}", text)
    if match is None:
        return [text]
    return [
        n
        for part in match[1].split(",")
        for n in expanded(text[: match.start()] + part + text[match.end() :])
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    text = (ROOT / document).read_text()
    named = {name for match in PATH.findall(text) for name in expanded(match)}
    missing = sorted(
        name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()
    )
    links = {link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")}
    missing += sorted(link for link in links if not ((ROOT / document).parent / link).exists())
    modules = MODULE.findall(text)
    missing += [
        m for m in modules
        if not (ROOT / f"{m.replace('.', '/')}.py").exists() and not (ROOT / m.replace(".", "/")).is_dir()
    ]  # fmt: skip
    assert not missing, f"{document} names what does not exist: {missing}"


def test_every_file_that_a_source_names_exists() -> None:
    """In docstrings, comments and messages."""
    sources = [
        p for folder in ("mgrpo", "csrc", "bench") for p in (ROOT / folder).rglob("*.[pch]*") if p.is_file()
    ]
    missing = []
    for source in sources:
        if source.suffix not in (".py", ".cpp", ".hpp"):
            continue
        named = {
            name for match in PATH.findall(source.read_text()) for name in expanded(match) if "." in name
        }
        missing += [f"{source.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing, "\n".join(sorted(missing))
