"""TOML and YAML, written; the standard library reads the one and knows nothing of the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ODD = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml(tree: Mapping[str, Any]) -> str:
    """A TOML document; None is left out."""
    return "\n".join(_table(tree, ())).lstrip("\n") + "\n"


def _table(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
    values = {key: value for key, value in tree.items() if key not in tables and value is not None}
    if path and (values or not tables):
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in values.items():
        yield f"{_key(key)} = {_value(value)}"
    for key, table in tables.items():
        yield from _table(table, (*path, key))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return _scalar(value)


def _scalar(value: Any) -> str:
    """JSON with every character escaped that TOML or YAML does not take as it is."""
    return _ODD.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def yaml(tree: Mapping[str, Any]) -> str:
    """A YAML document in block style; every scalar is written as JSON, which is YAML, so nothing is read as something
    else ("no", "1e3", "0644")."""
    return "\n".join(_block(tree, 0)) + "\n"


def _block(value: Any, depth: int) -> Iterator[str]:
    pad = "  " * depth
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = key if _BARE.fullmatch(key) else _scalar(key)
            if _is_nested(item):
                yield f"{pad}{name}:"
                yield from _block(item, depth + 1)
            else:
                yield f"{pad}{name}: {_flow(item)}"
        return
    for item in value:
        if isinstance(item, Mapping) and item:
            lines = list(_block(item, depth + 1))
            yield f"{pad}- {lines[0].lstrip()}"
            yield from lines[1:]
        else:
            yield f"{pad}- {_flow(item)}"


def _is_nested(item: Any) -> bool:
    """Tables and lists of tables have lines of their own; a list of plain values stays on one."""
    if isinstance(item, Mapping):
        return bool(item)
    return isinstance(item, list) and any(isinstance(entry, Mapping) for entry in item)


def _flow(item: Any) -> str:
    return _scalar(item)
