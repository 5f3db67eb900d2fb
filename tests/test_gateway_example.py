"""The gateway's example: its data answer its questions, its template carries tools, its programs have three changed
lines. The programs themselves run in tests_gateway, beside the frameworks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from mgrpo.config import load_config
from mgrpo.environments.loader import load_task
from mgrpo.model.chat import ChatFormat
from tests.runs import ROOT
from tests.test_chat import tokenizer

FOLDER = ROOT / "examples" / "gateway"
PROGRAMS = ("openai_sdk.py", "agents_sdk.py", "langgraph_team.py", "smolagents_team.py")
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the library.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gateway_example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_run_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config loads, and its task has questions in each split."""
    monkeypatch.chdir(ROOT)
    config = load_config(FOLDER / "gateway.toml")
    task = load_task(config.task, config.roles)
    assert task.roles == ("main", "researcher")
    assert task.question(0, 1).text.endswith("?")
    assert all(len(task.questions(split, 2)) == 2 for split in ("validation", "heldout"))


def test_every_question_is_answered_by_the_library() -> None:
    """The question itself finds it, and so do its words in another order."""
    library = module("library")
    lines = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    assert len(questions) == len({q["id"] for q in questions}) == 177
    for question in questions:
        fact, country = question["id"].split("-")
        for query in (question["question"], f"{country} {fact}"):
            assert library.search(query) == question["answer"], question
    assert library.search("nowhere") == "No entry has these words."


def test_the_template_carries_tools() -> None:
    """Tools, calls and results arrive as written; a history is only extended."""
    form = ChatFormat(tokenizer((FOLDER / "chat_template.jinja").read_text(encoding="utf-8")))
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "search", "arguments": {"query": "Fiji"}},
    }
    first = [
        {"role": "system", "content": "Look it up."},
        {"role": "user", "content": "capital of Fiji"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Suva", "tool_call_id": "call00001"},
    ]
    opening = form.open(first, [SEARCH])
    assert opening.text == (
        "<|im_start|>system\nLook it up.\n\nTools:\n- search(query): Search the library.\n"
        'Call one with <tool_call>{"name": "...", "arguments": {...}}</tool_call>.<|im_end|>\n'
        "<|im_start|>user\ncapital of Fiji<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "search", "arguments": {"query": "Fiji"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nSuva<|im_end|>\n<|im_start|>assistant\n"
    )
    more = form.extend([{"role": "tool", "content": "Tonga"}] * 2, opening=opening)
    assert form.tokenizer.decode(more) == (
        "\n<|im_start|>tool\nTonga<|im_end|>\n<|im_start|>tool\nTonga<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_three_lines_are_changed(program: str) -> None:
    """Each program numbers them: the address, the key, the model. Nothing else in it is mgrpo's."""
    text = (FOLDER / program).read_text(encoding="utf-8")
    numbered = [line for line in text.splitlines() if any(f"# {n}. " in line for n in (1, 2, 3))]
    assert [line.split("# ")[1][0] for line in numbered] == ["1", "2", "3"]
    assert "OPENAI_BASE_URL" in numbered[0] and "OPENAI_API_KEY" in numbered[1]
    assert "mgrpo" not in text


def test_the_model_folder_has_the_template(tmp_path: Path) -> None:
    """The source's files, its weights by a link, the template in its tokenizer's settings."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name, content in (
        ("config.json", "{}"),
        ("model.safetensors", "weights"),
        ("tokenizer_config.json", "{}"),
    ):
        (source / name).write_text(content)
    made = module("model")
    made.make(source, target)
    made.make(source, target)  # again, over what is there
    assert (target / "model.safetensors").is_symlink() and (
        target / "model.safetensors"
    ).read_text() == "weights"
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"chat_template": made.TEMPLATE}
    with pytest.raises(OSError):
        made.make(tmp_path / "missing", target)
    assert (target / "config.json").exists()
