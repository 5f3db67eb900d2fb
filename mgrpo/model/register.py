"""Architectures that transformers does not know: the module that registers one with its Auto classes.

config.json of a policy's folder names its architecture (`model_type`). A package adds one with an entry point in the
group `mgrpo.models`, model_type -> module.
"""

from __future__ import annotations

import importlib
import json
from importlib.metadata import entry_points
from pathlib import Path

from mgrpo.errors import ConfigError

BUILT_IN = {"mgrpo_shift_decoder": "mgrpo.tasks.atlas.decoder"}
GROUP = "mgrpo.models"


def register_architecture(folder: Path) -> None:
    """Import what registers the architecture of the policy in `folder`; nothing for one that transformers knows. What
    is wrong with config.json is left for the loader. Raises ConfigError where the module cannot be imported."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    kind = config.get("model_type") if isinstance(config, dict) else None
    modules = {point.name: point.value for point in entry_points(group=GROUP)} | BUILT_IN
    if isinstance(kind, str) and kind in modules:
        try:
            importlib.import_module(modules[kind])
        except ImportError as error:
            raise ConfigError(f"{folder}: architecture {kind!r} needs {modules[kind]}: {error}") from error
