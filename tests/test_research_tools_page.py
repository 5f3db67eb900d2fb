"""docs/research-tools.md says what the config classes are, and its blocks work."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from pathlib import Path

import pytest

from mgrpo.config.settings import Settings
from mgrpo.plugins import find_class
from mgrpo.tools.base import Observation
from mgrpo.tools.registry import BUILT_IN, GROUP, ToolConfig, build_tools
from tests.fake_services import FakeService
from tests.remote_kit import (
    FIJI,
)

ROOT = Path(__file__).parent.parent
COMMON = {"type", "include", "exclude", "rename"}


def config_of(kind: str) -> type[Settings]:
    return find_class("type", kind, BUILT_IN, GROUP, ToolConfig)  # type: ignore[type-abstract]


def test_the_page_about_tools_names_every_key() -> None:
    """docs/research-tools.md: each type's row lists its own keys with their defaults, as the config classes have them;
    those of every service stand in a table of their own."""
    page = (ROOT / "docs" / "research-tools.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    base = find_class("type", "mgrpo.tools.remote:RemoteConfig", BUILT_IN, GROUP, ToolConfig)  # type: ignore[type-abstract]
    shared = set(base.model_fields) - COMMON
    assert {name for name in shared if name not in rows} == set(), "keys of every service"
    assert set(BUILT_IN) <= set(rows), "types"
    for kind in BUILT_IN:
        fields = config_of(kind).model_fields
        own = {
            name
            for name, found in fields.items()
            if name not in COMMON
            and (name not in shared or repr(found.default) != repr(base.model_fields[name].default))
        }
        cell = dict(re.findall(r"`(\w+)(?: = ([^`]*))?`", rows[kind].split(" | ")[-1]))
        named = set(cell)
        for name, shown in cell.items():
            assert not shown or json.loads(shown) == fields[name].default, f"{kind}.{name}"
        assert named - {"url"} == own - {"url"}, (
            f"{kind}: the page names {sorted(named)}, the class has {sorted(own)}"
        )


def test_blocks_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/research-tools.md: its entries are configs, its tool answers, its client asks and reads."""
    page = (ROOT / "docs" / "research-tools.md").read_text()
    for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    entries = [entry for block in blocks for entry in block["task"]["options"]["tools"].values()]
    assert {"serper", "jina", "mcp", "search_r1", "python", "own_search:OwnSearch"} == {
        e["type"] for e in entries
    }
    for entry in entries:
        config_of(entry["type"]).model_validate(entry)
    units, mine = (
        next(e for e in entries if e["type"] == kind) for kind in ("python", "own_search:OwnSearch")
    )
    with FakeService({"hits": [{"name": "Fiji", "at": FIJI, "about": None}]}) as service:

        async def main() -> list[Observation]:
            tools = build_tools({"units": units, "mine": mine | {"url": service.url}})
            calls = [("miles", {"kilometres": 5}), ("miles", {"kilometres": -1}), ("search", {"query": "q"})]
            try:
                return [await tools.call(name, arguments) for name, arguments in calls]
            finally:
                await tools.close()

        good, bad, found = asyncio.run(main())
    assert good.text == "3.107" and (bad.status, bad.text) == ("tool_error", "A distance is 0 or more.")
    assert found.text == f"[1] Fiji\n{FIJI}" and service.requests[0].json == {"q": "q", "n": 5, "until": 2024}
