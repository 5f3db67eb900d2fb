"""docs/gateway.md: its first example is a task that plays, and it leaves no option out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgrpo.config import load_config
from mgrpo.config.settings import Settings
from mgrpo.gateway.harness import Access, HarnessOptions
from mgrpo.gateway.harness_options import HarnessScoring
from mgrpo.gateway.options import GatewayOptions
from mgrpo.run.processes import load_run_task
from tests.harness_kit import ask, played, rollout_of
from tests.question_kit import write_jsonl
from tests.research_kit import FIJI, words_of
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "gateway.md").read_text()


@pytest.mark.parametrize("kind", [HarnessOptions, HarnessScoring, GatewayOptions])
def test_the_page_names_every_option(kind: type[Settings]) -> None:
    """docs/gateway.md leaves no key out."""
    assert [name for name in kind.model_fields if f"`{name}`" not in PAGE] == []


def test_the_pages_first_example_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two files are loaded as they stand, and its team plays a rollout, over a client that stands for the SDK's."""

    class Client:
        def __init__(self, base_url: Access, api_key: str) -> None:
            assert api_key == base_url.api_key
            self.chat = self.completions = self
            self._base_url = base_url

        async def create(self, model: str, messages: list[dict[str, str]]) -> Any:
            text = await ask(self._base_url, model, *(m["content"] for m in messages))
            return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])

    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(AsyncOpenAI=Client))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in blocks] == ["team.py", "run.toml"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    write_jsonl(tmp_path / "questions.jsonl", [{"id": "q", "question": "Who?", "answer": "x"}] * 1)
    config = load_config(tmp_path / "run.toml")
    task = load_run_task(config)
    rollout = rollout_of(played(task, question=FIJI))
    assert rollout.d_k() == {"sub": 1} and rollout.correct == 0.0
    assert "It is known that: said said What is the capital" in words_of(rollout.main, 0)
