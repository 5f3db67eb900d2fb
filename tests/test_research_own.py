"""examples/deep_research: a task of one's own in one file trains, and calls its tools on the way; the paper's config
loads, makes its task and can be planned."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.config import load_config
from mgrpo.config.settings import Settings
from mgrpo.environments.loader import load_task
from mgrpo.model.policy import Policy, save_policy
from mgrpo.planning.assumptions import GPUS, Assumptions
from mgrpo.planning.plan import limits_of, plan_agent
from mgrpo.run.processes import load_run_task
from mgrpo.tasks.research.options import (
    AgentOptions,
    CassetteOptions,
    LimitOptions,
    ResearchOptions,
    ScoreOptions,
)
from tests.families import family
from tests.runs import ROOT, leftovers, records, summary, train
from tests.test_chat import CHATML

FOLDER = ROOT / "examples" / "deep_research"
PAPER = FOLDER / "paper.toml"
WORDS = [
    ("ask", {"task": "go"}), ("ask", {"task": "ask"}), ("length", {"river": "Rhine"}), ("length", {"river": "Po"}),
    ("rivers_of", {"country": "France"}), ("report", {"report": "1233"}), ("report", {"report": "2850"}),
    ("answer", {"answer": "1233"}), ("answer", {"answer": "2850"}), ("search", {"query": "x"}),
]  # fmt: skip


def calling_tokenizer() -> Any:
    """Each of a few tool calls is one token, so that a model of random weights makes them, one or more in a turn."""
    calls = [json.dumps({"name": n, "arguments": a}, separators=(",", ":")) for n, a in WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *calls])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    made.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True)
    made.chat_template = CHATML
    return made


def tiny_model(path: Path) -> str:
    tokenizer = calling_tokenizer()
    model = family("Llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    save_policy(Policy(model, tokenizer), path)
    return str(path)


def test_a_task_of_ones_own_trains(tmp_path: Path) -> None:
    """Three steps with a tiny random model whose words are tool calls: the tool in Python and the one of the MCP server
    are called, answers are scored, and nothing is left running."""
    model = tiny_model(tmp_path / "model")
    server = f'{{ type = "mcp", command = ["{sys.executable}", "{FOLDER / "my_server.py"}"] }}'
    prompt = "Call tools. {date}"
    sets = [
        f"task.options.tools={{ rivers = {server} }}",
        f'task.options.agents={{ main = {{ prompt = "{prompt}" }}, sub = {{ prompt = "{prompt}" }} }}',
        "task.options.limits={ turns = 3, asks = 3, turn_tokens = 4, answer_tokens = 4, observation_tokens = 128 }",
        f'agents.main.model="{model}"',
        'agents.main.policy={ dtype = "float32" }',
        'agents.sub={ shares = "main", d_max = 3, max_length = 512, reward = { format = 0.1, outcome = 0.9 }, '
        "optimizer = { lr = 5e-5 } }",
        "agents.main.max_length=512",
        *("trainer.steps=3", "trainer.questions=2", "trainer.group_size=8"),
        *("eval.every=3", "eval.validation=2", "eval.heldout=2", "eval.start_validation=0"),
    ]
    out = tmp_path / "run"
    train(FOLDER / "my_research.toml", out, *sets)
    assert summary(out)["finished"] and leftovers(out) == []
    names = {name for record in records(out) for name in record}
    used = {name.split("/")[2] for name in names if name.startswith("rollout/tool/")}
    assert used == {"length", "rivers_of"}
    assert {"main/task/turns", "sub/task/tool_errors", "rollout/task/judged", "sub/reward/format"} <= names


def paper_files(folder: Path) -> list[str]:
    """Overrides with files where the paper's config expects them."""
    rows = [{"id": f"q{i}", "question": f"Who {i}?", "answer": "x", "pass_rate": 0.2} for i in range(40)]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f'task.options.questions.path="{file}"',
        f'task.stages.1.options.questions.path="{file}"',
        f'task.options.cassette.path="{folder / "answers.sqlite"}"',
    ]


def test_the_papers_config(tmp_path: Path) -> None:
    """Its numbers are the paper's, and it fits 64 GPUs."""
    config = load_config(PAPER, paper_files(tmp_path))
    main, sub = config.agents["main"], config.agents["sub"]
    assert main.reward.gate and main.reward.parts == {"format": 0.1, "correct": 0.9}
    assert sub.reward.gate and sub.reward.parts == {"format": 0.1, "outcome": 0.4, "expert": 0.5}
    assert (config.trainer.group_size, sub.d_max, main.max_length, sub.max_length) == (8, 8, 32768, 32768)
    assert [s.name for s in config.eval.sets] == ["gaia", "xbench-deepsearch", "webwalkerqa"]
    assert {(s.every, s.repeats) for s in config.eval.sets} == {(25, 3)}
    assert [stage.name for stage in config.task.stages] == ["simple", "hard"]
    servers = sum(len(config.agents[role].engine.running_servers) for role in config.roles)
    assert sum(config.ranks(role) for role in config.roles) + 8 * servers == 64


def test_the_papers_task(tmp_path: Path) -> None:
    """It is made, in both stages, with a search and a reader; agents have 20 turns."""
    task: Any = load_run_task(load_config(PAPER, paper_files(tmp_path)))
    assert task.scores["sub"] == {"format", "expert"} and task.chat_use.tools
    assert task.stages[0].team["sub"].tools.names == ("search", "visit")
    for stage in getattr(task, "stages", [task]):
        assert stage.options.limits.turns == 20 and stage.options.score.format == "strict"


def test_the_papers_config_can_be_planned(tmp_path: Path) -> None:
    """`mgrpo plan` takes it, here with a small mixture of experts in the place of the large."""
    tokenizer = calling_tokenizer()
    shape = {"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768}
    save_policy(Policy(family("Qwen3Moe", vocab_size=len(tokenizer), **shape), tokenizer), tmp_path / "model")
    sets = [f'agents.{role}.model="{tmp_path / "model"}"' for role in ("main", "sub")]
    config = load_config(PAPER, [*paper_files(tmp_path), *sets])
    planned = plan_agent(config, "sub", limits_of(GPUS["h100"], None, 2 * 10**12, Assumptions()))
    assert planned.needed < planned.available


def test_the_example_loads() -> None:
    """The file beside the config gives its class; questions of the splits differ."""
    config = load_config(FOLDER / "my_research.toml", ["task.options.tools={}"])
    task: Any = load_task(config.task, config.roles)
    texts = [{q.text for q in task.questions(split, 6)} for split in ("train", "validation", "heldout")]
    assert all(texts) and not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert "length" in task.team["sub"].tools.names and task.team["main"].tools.names == ()


@pytest.mark.parametrize("kind", [ResearchOptions, AgentOptions, LimitOptions, ScoreOptions, CassetteOptions])
def test_the_page_names_every_option(kind: type[Settings]) -> None:
    """docs/research.md leaves no key out."""
    page = (ROOT / "docs" / "research.md").read_text()
    assert [name for name in kind.model_fields if f"`{name}`" not in page and f".{name}`" not in page] == []
