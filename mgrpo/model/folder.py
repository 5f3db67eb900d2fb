"""What a model folder says of itself without being loaded: mistakes that a run would meet minutes later, in some other
process and in other words. check_folder reads JSON alone; check_chat_folder loads the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgrpo.config.policy import PolicyConfig
from mgrpo.errors import ConfigError
from mgrpo.model import architecture

if TYPE_CHECKING:
    from mgrpo.model.chat_check import ChatUse

_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def check_folder(folder: Path, name: str, length: int, chat: bool) -> None:
    """name: of the setting that gave the folder. length: tokens of the longest history. chat: its agent is spoken to
    through a chat template. Raises ConfigError with the setting, the value and the bound."""
    if not folder.is_dir():
        raise ConfigError(f"{name}: no folder {folder}")
    config = _read(folder / "config.json", name)
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        raise ConfigError(f"{name}: {folder} has no weights ({', '.join(_WEIGHTS)})")
    if not any((folder / file).exists() for file in _TOKENIZERS):
        raise ConfigError(f"{name}: {folder} has no tokenizer ({', '.join(_TOKENIZERS)})")
    text = architecture.text_of(config)
    if method := architecture.quantized(config):
        raise ConfigError(
            f"{name}: the weights of {folder} are quantised ({method}), and policies train in float32; take the "
            "folder with the plain weights"
        )
    if setting := architecture.after_head(config):
        raise ConfigError(
            f"{name}: {folder} has {setting} behind its head ({config.get('model_type', 'no model_type')}), which the "
            "fused loss does not compute; take another model"
        )
    positions = architecture.positions(config)
    if positions is not None and length > positions:
        raise ConfigError(
            f"{name}: {folder} has {positions} positions, max_length is {length}; lower max_length or take a model "
            "with a longer context"
        )
    vocabulary = text.get("vocab_size")
    if isinstance(vocabulary, int) and (token := _last_token(folder, name)) >= vocabulary:
        raise ConfigError(
            f"{name}: the tokenizer of {folder} has a token {token}, the model's vocabulary ends at {vocabulary - 1}; "
            "they belong to different models"
        )
    if chat and not _has_template(folder, name):
        raise ConfigError(
            f"{name}: the tokenizer of {folder} has no chat template; take an instruction-tuned model or put its "
            "chat_template.jinja into the folder"
        )


def check_experts(folder: Path, name: str, policy: PolicyConfig) -> None:
    """Whether settings of experts have a model with experts. name: of the table that has the settings. The folder has
    passed check_folder. Raises ConfigError with setting and value."""
    if architecture.has_experts(_read(folder / "config.json", name)):
        return
    if policy.aux_loss_coef:
        raise ConfigError(
            f"{name}.aux_loss_coef={policy.aux_loss_coef:g} needs a mixture of experts; {folder} is a dense model"
        )
    if policy.routing_replay:
        raise ConfigError(f"{name}.routing_replay=true needs a mixture of experts; {folder} is a dense model")
    if not policy.train_router:
        raise ConfigError(f"{name}.train_router=false has no effect; {folder} is a dense model")
    if policy.experts != "auto":
        raise ConfigError(f'{name}.experts="{policy.experts}" has no effect; {folder} is a dense model')
    if fused := [
        target for target in policy.lora.targets if policy.lora.rank and target.startswith("experts.")
    ]:
        raise ConfigError(f"{name}.lora.targets has {fused[0]!r}; {folder} is a dense model")


def check_chat_folder(folder: Path, name: str, use: ChatUse) -> None:
    """Whether the folder's chat template can hold the conversations of a task. name: as in check_folder, which comes
    first. Raises ConfigError with it."""
    from transformers import AutoTokenizer

    from mgrpo.model.chat_check import check_chat

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: no tokenizer loads from {folder}: {error}") from error
    check_chat(tokenizer, use, name)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{name}: {path.parent} has no {path.name}; expected a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: {path} holds no JSON object")
    return found


def _last_token(folder: Path, name: str) -> int:
    """The highest token id; -1 where only the tokenizer itself could say."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return -1
    tokenizer = _read(path, name)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.get("id") for token in tokenizer.get("added_tokens", [])]
    return max((i for i in ids if isinstance(i, int)), default=-1)


def _has_template(folder: Path, name: str) -> bool:
    if any((folder / file).exists() for file in _TEMPLATES):
        return True
    path = folder / "tokenizer_config.json"
    return path.exists() and bool(_read(path, name).get("chat_template"))
