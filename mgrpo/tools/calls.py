"""Tool calls as text: how agents are asked to write them, and what of their words counts.

    hermes   <tool_call>
             {"name": "search", "arguments": {"query": "highest point of Fiji"}}
             </tool_call>
    json     {"name": "search", "arguments": {"query": "highest point of Fiji"}}

Several calls of one turn stand one after the other and run at the same time. A turn is understood generously and
graded strictly.

Strict is a turn of such calls and nothing else. In hermes, words may stand before the first call; in both formats a
turn may begin with thoughts, up to </think>. Each object has exactly the keys name (a text) and arguments (an object).

Understood, though not strict, are: words elsewhere, code fences, Python's quotes, closing braces or tags that are
missing, calls without their tags, arguments under another key, beside the name or as a text that holds JSON, the call
in a table `function`. What is not understood becomes a call with a `problem`: the words that the agent sees of it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mgrpo.tools.json_objects import Found, objects, read_json

Format = Literal["hermes", "json"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 32
"""Calls of one turn that are read."""
MAX_NAME = 100
"""Characters of a tool's name."""
MAX_DEPTH = 16
"""Tables and lists within each other in the arguments of a call."""

_EXAMPLE = '{"name": "...", "arguments": {...}}'
_EXPECTED = {"hermes": f"{OPEN}{_EXAMPLE}{CLOSE}", "json": _EXAMPLE}


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call. arguments: JSON values of texts that can be encoded. problem: why it cannot be made; empty: it
    was understood."""

    name: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """What an agent wants to do: at least one call, in the order of its words."""

    calls: tuple[Call, ...]
    strict: bool


def render(form: Format, *calls: tuple[str, Mapping[str, object]]) -> str:
    """A turn of tool calls (name, arguments) as the agents should write it."""
    texts = [json.dumps({"name": n, "arguments": dict(a)}, ensure_ascii=False) for n, a in calls]
    return "\n".join(f"{OPEN}\n{text}\n{CLOSE}" for text in texts) if form == "hermes" else "\n".join(texts)


def parse(form: Format, text: str) -> Turn:
    """The calls in one turn. One that is not understood has one call, with its problem."""
    said = _behind_thoughts(text)
    if said is None:
        return _not_understood("your thoughts did not end: no </think> was found")
    read = _hermes if form == "hermes" and OPEN in said else _bare
    calls, strict = read(said)
    if not calls:
        return _not_understood(f"no tool call was found in your turn; expected {_EXPECTED[form]}")
    if len(calls) > MAX_CALLS:
        calls, strict = calls[:MAX_CALLS], False
    in_form = form == "json" or OPEN in said
    return Turn(tuple(calls), strict and in_form and not any(call.problem for call in calls))


def _not_understood(problem: str) -> Turn:
    return Turn((Call(problem=problem),), strict=False)


def _behind_thoughts(text: str) -> str | None:
    """The turn without its thoughts; None where they do not end. A turn that begins with a call has none."""
    text = text.strip()
    if text.startswith(("{", OPEN)):
        return text
    thoughts, end, rest = text.partition("</think>")
    if end:
        return rest.strip()
    return None if text.startswith("<think>") else thoughts


@dataclass(frozen=True, slots=True)
class Block:
    """A call and its place: text[start:end], tags included. closed: its closing tag is there. strict: its object is as
    it should be."""

    call: Call
    start: int
    end: int
    closed: bool
    strict: bool


def blocks(text: str) -> list[Block]:
    """The calls between tags, from left to right, one more than MAX_CALLS at most."""
    found: list[Block] = []
    start = text.find(OPEN)
    while start >= 0 and len(found) <= MAX_CALLS:
        call, strict, end = _block(text, start + len(OPEN))
        found.append(Block(call, start, end, text.endswith(CLOSE, start, end), strict))
        start = text.find(OPEN, end)
    return found


def _hermes(text: str) -> tuple[list[Call], bool]:
    """The calls between tags, and whether the turn is strict."""
    found, strict = blocks(text), True
    for before, block in itertools.pairwise(found):
        strict &= not text[before.end : block.start].strip()
    strict &= all(block.strict for block in found) and not text[found[-1].end :].strip()
    return [block.call for block in found], strict


def _block(text: str, begin: int) -> tuple[Call, bool, int]:
    """(call, whether it is strict, end) of the block whose opening tag ends at `begin`."""
    start = begin + len(text[begin:]) - len(text[begin:].lstrip())
    value, end = read_json(text, start)
    rest = text[end:].lstrip() if isinstance(value, dict) else ""
    if isinstance(value, dict) and rest.startswith(CLOSE) and (found := _call(value)) is not None:
        return *found, len(text) - len(rest) + len(CLOSE)
    closed = text.find(CLOSE, begin)
    following = text.find(OPEN, begin)
    stop = min(place for place in (closed, following, len(text)) if place >= 0)
    end = stop + len(CLOSE) if stop == closed else stop
    inner = text[begin:stop]
    for candidate in objects(inner):
        if (found := _call(candidate.value)) is not None:
            return found[0], False, end
    return Call(problem=f"a tool call could not be read: {_shown(inner)}"), False, end


def _bare(text: str) -> tuple[list[Call], bool]:
    """The calls of a turn without tags, and whether they are all of it."""
    calls: list[Call] = []
    strict, end = True, 0
    for found, (call, plain) in _calls(text):
        calls.append(call)
        strict &= plain and not text[end : found.start].strip()
        end = found.end
        if len(calls) > MAX_CALLS:
            break
    return calls, strict and end <= len(text) and not text[end:].strip()


def _calls(text: str) -> Iterator[tuple[Found, tuple[Call, bool]]]:
    for found in objects(text, limit=2 * MAX_CALLS):
        if (call := _call(found.value)) is not None:
            yield found, call


def _call(value: Mapping[Any, object]) -> tuple[Call, bool] | None:
    """(call, whether its object is strict); None for an object that is none."""
    inner = value.get("function")
    strict = not isinstance(inner, dict)
    if isinstance(inner, dict):
        value = inner
    name = value.get("name")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        return None
    strict &= value.keys() == {"name", "arguments"} and isinstance(value["arguments"], dict)
    given = next((value[k] for k in ("arguments", "parameters", "args") if k in value), None)
    if isinstance(given, str):
        given, _ = read_json(given, 0)
    if not isinstance(given, dict):
        given = {k: v for k, v in value.items() if k not in ("name", "type", "id", "arguments")}
    try:
        arguments = _plain(given)
    except ValueError as error:
        return Call(problem=f"the arguments of {_shown(name)} cannot be taken: {error}"), False
    return Call(_text(name).strip(), arguments), strict and name == name.strip()  # type: ignore[arg-type]


def _plain(value: object, depth: int = 0) -> object:
    """`value` as JSON has it, its texts encodable. Raises ValueError for what JSON has not."""
    if depth > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_text(_key(key)): _plain(item, depth + 1) for key, item in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"a {type(value).__name__} that JSON does not have")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError("a name of an argument that is no text")
    return key


def _text(text: str) -> str:
    """Without lone surrogates and NUL, which neither tokenizers nor services take."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def _shown(text: str, limit: int = 80) -> str:
    text = " ".join(_text(text).split())
    return text if len(text) <= limit else f"{text[:limit]}..."
