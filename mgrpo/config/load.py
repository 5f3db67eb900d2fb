"""From a TOML file and dotted overrides to a RunConfig; every mistake becomes one line that names file and field."""

from __future__ import annotations

import codecs
import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mgrpo.config.run import RunConfig
from mgrpo.errors import ConfigError
from mgrpo.files import write_atomic

WHERE = (
    "url",
    "key_env",
    "max_outage",
    "host",
    "port",
    "advertise",
)  # of a service, and how long it is waited for
MAY_CHANGE = (
    *("store", "link", "rollout", "eval", "record", "metrics", "profile"),
    *("trainer.steps", "trainer.checkpoint_every", "trainer.keep_checkpoints"),
    *("trainer.stop_timeout", "trainer.threads"),
    "agents.<role>.url",
    *(f"agents.<role>.policy.{key}" for key in ("ranks", "mesh", "share_prefixes")),
    *(f"agents.<role>.engine.{key}" for key in ("urls", "replicas", "python", "folder", "timeout")),
    *(f"task.options.<service>.{key}" for key in WHERE),
    *(f"task.stages.<stage>.options.<service>.{key}" for key in WHERE),
)
"""Settings and sections that a resumed run may change: how long, where and by how many processes it is computed, how
often it is measured and what is kept of it; whether prefixes are computed once, so that a run that began before there
was such a setting goes on; of the services of a task where they are, whose key they get and how long they are waited
for. <service> stands for the options and every table in them. Everything else belongs to the run's digest."""

WIDE_MARKS = {  # the longer first: those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path` (.toml, or the .json that a run keeps of itself) and apply overrides such as "trainer.steps=40".

    An override's value is read as TOML and, failing that, as a string; a table of a list is named by its number, e.g.
    "eval.sets.0.n=20". task.path and the paths of eval.sets become absolute, so that every process of the run finds
    them. Raises ConfigError.
    """
    text = _text(path)
    try:
        tree: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:] or 'TOML'}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a table at the top, got {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    _resolve_paths(tree, path)
    try:
        # JSON mode: the kept copy of a config has lists where the tree has tuples.
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None


def dump_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config beside the run, so that --resume needs no other file: as a whole or not at all. Raises
    ConfigError naming the file when it cannot be written."""
    try:
        write_atomic(path, config.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the run's config ({error.strerror})") from None


def config_digest(config: RunConfig) -> str:
    """Sixteen hex digits, equal exactly for runs that compute the same: what MAY_CHANGE names does not count."""
    return hashlib.sha256(json.dumps(_computed(config), sort_keys=True).encode()).hexdigest()[:16]


def check_same_run(recorded: RunConfig, wanted: RunConfig) -> None:
    """Raise ConfigError naming every setting of a begun run that `wanted` changes although it may not."""
    old, new = _leaves(_computed(recorded)), _leaves(_computed(wanted))
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    if changed:
        texts = [f"{name} = {_shown(old.get(name))} -> {_shown(new.get(name))}" for name in changed]
        raise ConfigError(
            f"{'; '.join(texts)}: cannot change in a run that has begun. Resume without it, or begin a new run; "
            f"docs/config.md lists the settings that may change"
        )


def _computed(config: RunConfig) -> dict[str, Any]:
    """The part of a config on which the numbers of a run depend: all but MAY_CHANGE."""
    tree = config.model_dump(mode="json")
    if config.task.path is not None:  # where the file lies may differ from server to server
        tree["task"]["path"] = config.task.label
    for name in MAY_CHANGE:
        *sections, key = name.split(".")
        for section in _below(tree, sections):
            section.pop(key, None)  # engines of different types have different settings
    if not config.task.stages:  # a run without a curriculum is the run that it was before there were any
        del tree["task"]["stages"]
    return tree


def _below(tree: dict[str, Any], sections: Sequence[str]) -> list[dict[str, Any]]:
    """The tables that a dotted path leads to: <role> stands for every agent, <stage> for every stage, <service> for a
    table and all those in it."""
    found: list[Any] = [tree]
    for section in sections:
        if section == "<role>":
            found = [inner for table in found for inner in table.values()]
        elif section == "<stage>":
            found = [inner for stages in found for inner in stages]
        elif section == "<service>":
            found = [inner for table in found for inner in _tables(table)]
        else:
            found = [table[section] for table in found]
    return found


def _tables(value: object) -> list[dict[str, Any]]:
    """A table and those at any depth in it, also in lists."""
    if isinstance(value, dict):
        return [value, *(table for inner in value.values() for table in _tables(inner))]
    return [table for inner in value for table in _tables(inner)] if isinstance(value, list) else []


def _leaves(tree: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Dotted name -> value of everything that is not a table."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _leaves(value, f"{name}{key}.") if isinstance(value, dict) else {}
        leaves |= inner or {f"{name}{key}": value}
    return leaves


def _shown(value: object) -> str:
    return "unset" if value is None else json.dumps(value)


def _text(path: Path) -> str:
    """A text file in UTF-8, with or without the byte order mark that some editors write. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file ({error.strerror})") from None
    for mark, encoding in WIDE_MARKS.items():
        if data.startswith(mark):
            raise ConfigError(
                f"{path}: not a text file in UTF-8: it begins with the byte order mark of {encoding}; save it as UTF-8"
            )
    if b"\0" in data:
        raise ConfigError(
            f"{path}: not a text file in UTF-8: byte {data.index(0)} is zero, as in UTF-16; save it as UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


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
        if isinstance(node, list):
            node = node[int(part)] if _is_place(part, node) else None
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[: depth + 1])} is not a section")
    if isinstance(node, dict):
        node[parts[-1]] = value
    elif _is_place(parts[-1], node):
        node[int(parts[-1])] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parts[:-1])} has {len(node)} entries")


def _is_place(part: str, entries: list[Any]) -> bool:
    """Whether `part` is the number of one of the entries."""
    return part.isascii() and part.isdigit() and int(part) < len(entries)


def _resolve_paths(tree: dict[str, Any], path: Path) -> None:
    """Make the paths of files absolute; what is no text is left for the config to refuse."""
    task, evaluation = tree.get("task"), tree.get("eval")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    for table in (task, *(sets if isinstance(sets, list) else ())):
        if isinstance(table, dict) and isinstance(table.get("path"), str):
            table["path"] = str((path.parent / table["path"]).resolve())


def _first(error: ValidationError) -> str:
    """The first problem as `field: what was expected, got value`, with the number of further ones."""
    problems = error.errors()
    first = problems[0]
    # What stands in parentheses is the chosen type of a table, no part of its name.
    field = ".".join(p for p in map(str, first["loc"]) if not p.startswith("(")) or "the config"
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
