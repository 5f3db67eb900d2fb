"""The tokens that end generation, as a model's files give them.

They are `eos_token_id` of its generation config, one id or a list (Llama 3: <|eot_id|> and <|eom_id|>; GLM-4: the
markers of the next role), and its tokenizer's eos token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mgrpo.errors import ConfigError

_ATTRIBUTE = "generation_stops"  # of a tokenizer: what stops_of() adds to its eos token


def remember_stops(tokenizer: Any, generation: Any) -> None:
    """Let `tokenizer` carry the end tokens of its model, from where it goes without the model. generation: the model's
    generation config, or None."""
    setattr(tokenizer, _ATTRIBUTE, _ids(getattr(generation, "eos_token_id", None)))


def stops_of(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the end tokens: those that remember_stops left, otherwise of the folder that the tokenizer was loaded
    from; the tokenizer's own eos token last. Ids that are ordinary text in this vocabulary are left out: they are a
    configuration class's defaults. Raises ConfigError for a file that cannot be read."""
    remembered = getattr(tokenizer, _ATTRIBUTE, None)
    found = _of_folder(Path(tokenizer.name_or_path)) if remembered is None else remembered
    known = tokenizer.added_tokens_decoder
    return tuple(dict.fromkeys([*(i for i in found if i in known), *_ids(tokenizer.eos_token_id)]))


def _of_folder(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        if isinstance(content, dict) and (ids := _ids(content.get("eos_token_id"))):
            return ids
    return ()


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(i for i in values if isinstance(i, int) and not isinstance(i, bool))
