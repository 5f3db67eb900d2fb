"""From a TOML file and dotted overrides to a RunConfig; every mistake becomes one line that names file and field."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mgrpo.config.run import RunConfig
from mgrpo.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` (.toml, or the .json that a run keeps of itself) and apply overrides such as "trainer.steps=40".

    An override's value is read as TOML and, failing that, as a string. Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None
    try:
        tree: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:] or 'TOML'}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a table at the top, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        # JSON mode: the kept copy of a config has lists where the tree has tuples.
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config beside the run, so that --resume needs no other file."""
    path.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def config_digest(config: RunConfig) -> str:
    """Sixteen hex digits that are equal exactly for runs that compute the same: addresses and length do not count."""
    tree = config.model_dump(mode="json")
    tree.pop("store")
    tree.pop("link")
    for agent in tree["agents"].values():
        agent.pop("url")
        agent["policy"].pop("ranks")
        for key in ("urls", "replicas", "python", "folder", "timeout"):  # where rollouts are served, not what
            agent["engine"].pop(key)
    tree["trainer"].pop("steps")
    for section, key in (
        ("trainer", "threads"),
        ("trainer", "checkpoint_every"),
        ("trainer", "keep_checkpoints"),
    ):
        tree[section].pop(key)
    for section in ("rollout", "eval", "record"):
        tree.pop(section)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: expected section.field=value")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[: depth + 1])} is not a section")
    node[parts[-1]] = value


def _first(error: ValidationError) -> str:
    """The first problem as `field: what was expected, got value`, with the number of further ones."""
    problems = error.errors()
    first = problems[0]
    field = ".".join(str(p) for p in first["loc"]) or "the config"
    if first["type"] == "extra_forbidden":
        text = f"{field}: unknown key"
    elif first["type"] == "missing":
        text = f"{field}: required, but missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        given = first["input"]
        shown = "" if isinstance(given, dict | list) or first["type"] == "value_error" else f", got {given!r}"
        text = f"{field}: {message}{shown}" if first["loc"] else f"{message}{shown}"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")
