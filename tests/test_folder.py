"""A model folder is judged by its files before anything runs: one line with the setting, the value and the bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgrpo.config.policy import LoraConfig, PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model.folder import check_experts, check_folder
from mgrpo.model.policy import save_policy
from tests.models import VOCAB, tiny_policy

POSITIONS = 64  # of the tiny models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(tiny_policy("shift"), tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_whole_folder_passes(folder: Path) -> None:
    """Up to its last position, and with a template wherever one may lie."""
    check_folder(folder, "agents.main.model", POSITIONS, chat=False)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    check_folder(folder, "agents.main.model", POSITIONS, chat=True)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages }}"))
    check_folder(folder, "agents.main.model", POSITIONS, chat=True)


def test_a_model_that_also_sees_is_judged_by_its_text_part(folder: Path) -> None:
    """Positions and vocabulary stand in text_config there."""
    edit(folder / "config.json", lambda c: (c.update(text_config=dict(c)), c.pop("max_position_embeddings")))
    with pytest.raises(ConfigError, match=f"has {POSITIONS} positions, max_length is 65"):
        check_folder(folder, "agents.main.model", POSITIONS + 1, chat=False)


@pytest.mark.parametrize(
    ("damage", "length", "chat", "words"),
    [
        (lambda f: f.rename(f.with_name("gone")), 8, False, "no folder .*model"),
        (lambda f: (f / "config.json").unlink(), 8, False, "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), 8, False, "cannot read .*config.json"),
        (lambda f: (f / "config.json").write_text("[]"), 8, False, "holds no JSON object"),
        (lambda f: (f / "model.safetensors").unlink(), 8, False, r"has no weights \(\*.safetensors"),
        (lambda f: [p.unlink() for p in f.glob("token*")], 8, False, "has no tokenizer"),
        (lambda f: None, POSITIONS + 1, False, f"has {POSITIONS} positions, max_length is {POSITIONS + 1}"),
        (lambda f: None, 8, True, "no chat template; take an instruction-tuned model"),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(vocab_size=VOCAB - 3)),
            8,
            False,
            f"a token {VOCAB - 1}, the model's vocabulary ends at {VOCAB - 4}",
        ),
        (
            lambda f: edit(
                f / "config.json", lambda c: (c.pop("max_position_embeddings"), c.update(n_positions=32))
            ),
            33,
            False,
            "has 32 positions, max_length is 33",
        ),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(final_logit_softcapping=30.0)),
            8,
            False,
            r"has final_logit_softcapping=30 behind its head \(",
        ),
        (
            lambda f: edit(
                f / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"})
            ),
            8,
            False,
            r"quantised \(fp8\), and policies train in float32",
        ),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), 8, False, "cannot read .*tokenizer.json"),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, damage: Callable[[Path], object], length: int, chat: bool, words: str
) -> None:
    """Each mistake has its line, which begins with the setting."""
    damage(folder)
    with pytest.raises(ConfigError, match=f"^agents.main.model: .*{words}"):
        check_folder(folder, "agents.main.model", length, chat)


def test_settings_of_experts_need_a_model_with_experts(folder: Path) -> None:
    """Said by config.json, under whatever name, before anything is loaded; plain settings fit every model."""
    adapters = LoraConfig(rank=2, targets=("q_proj", "experts.down_proj"))
    settings = {
        r"policy\.aux_loss_coef=0\.001 needs a mixture of experts; .* is a dense model": {
            "aux_loss_coef": 1e-3
        },
        r'policy\.experts="eager" has no effect; .* is a dense model': {"experts": "eager"},
        r"policy\.routing_replay=true needs a mixture of experts; .* is a dense model": {
            "routing_replay": True
        },
        r"policy\.train_router=false has no effect; .* is a dense model": {"train_router": False},
        r"policy\.lora\.targets has 'experts\.down_proj'; .* is a dense model": {"lora": adapters},
    }
    check_experts(folder, "agents.main.policy", PolicyConfig(lora=LoraConfig(rank=2)))
    for words, setting in settings.items():
        with pytest.raises(ConfigError, match=rf"agents\.main\.{words}"):
            check_experts(folder, "agents.main.policy", PolicyConfig(**setting))
    edit(folder / "config.json", lambda c: c.update(n_routed_experts=8))
    for setting in settings.values():
        check_experts(folder, "agents.main.policy", PolicyConfig(**setting))
