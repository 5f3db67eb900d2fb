"""Tool calls in JSON: how the two agents of atlas-chat are asked to speak, and what of their words counts.

    main   {"name": "ask", "arguments": {"relation": "capital", "entity": "Fiji"}}
           {"name": "answer", "arguments": {"value": "Suva"}}
    sub    {"name": "search", "arguments": {"query": "Fiji"}}
           {"name": "open", "arguments": {"title": "Fiji"}}
           {"name": "answer", "arguments": {"value": "Suva"}}

A turn is understood generously and graded strictly. `strict` is a turn that is this one JSON object and nothing else,
with these keys and non-empty strings. Understood, though not strict, are: text or a code fence around the object, more
than one object (the first counts), Python's quotes, closing braces that are missing at the end, arguments under another
key or beside the name, further arguments, numbers in place of strings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgrpo.tools.json_objects import objects

TOOLS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "main": {"ask": ("relation", "entity"), "answer": ("value",)},
    "sub": {"search": ("query",), "open": ("title",), "answer": ("value",)},
}
"""role -> tool -> its arguments"""

MAX_VALUE = 80
"""Characters of one argument; the rest is cut off. No name of the world is longer than 40."""

Message = dict[str, str]

_SYSTEM = {
    "main": "Reply with one JSON object. First ask, one relation at a time, then answer with the result.",
    "sub": "Search, open one title, then answer. Write one JSON object.",
}


@dataclass(frozen=True, slots=True)
class _Example:
    """One fact of a world that does not exist. Two of them: with one, SmolLM2-135M never finds the tool's name."""

    relation: str
    entity: str
    value: str
    titles: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]


_EXAMPLES = (
    _Example(
        "capital",
        "Arvandor",
        "Lirien",
        ("Lirien", "Arvandor", "Quill"),
        (("currency", "AVD"), ("capital", "Lirien"), ("phone", "+555")),
    ),
    _Example("country", "Quillan", "Quill", ("Quill", "Quillan", "Lirien"), (("country", "Quill"),)),
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One turn. arguments: exactly those of TOOLS, printable text that encodes to UTF-8."""

    name: str
    arguments: Mapping[str, str]
    strict: bool


def render(name: str, **arguments: str) -> str:
    """A tool call as the agents should write it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def main_messages(question: str) -> list[Message]:
    """The main agent's prompt: its role, two examples, the question ("capital of Fiji")."""
    messages = [_says("system", _SYSTEM["main"])]
    for e in _EXAMPLES:
        messages += [
            _says("user", _main_question(f"{e.relation} of {e.entity}")),
            _says("assistant", render("ask", relation=e.relation, entity=e.entity)),
            _says("user", main_result(e.value)),
            _says("assistant", render("answer", value=e.value)),
        ]
    return [*messages, _says("user", _main_question(question))]


def sub_messages(relation: str, entity: str) -> list[Message]:
    """A sub-agent's prompt: its role, two examples, the fact it is asked for."""
    messages = [_says("system", _SYSTEM["sub"])]
    for e in _EXAMPLES:
        messages += [
            _says("user", _sub_question(e.relation, e.entity)),
            _says("assistant", render("search", query=e.entity)),
            _says("user", sub_titles(e.titles)),
            _says("assistant", render("open", title=e.entity)),
            _says("user", sub_document(e.entity, e.fields, e.relation)),
            _says("assistant", render("answer", value=e.value)),
        ]
    return [*messages, _says("user", _sub_question(relation, entity))]


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _main_question(question: str) -> str:
    return f"Question: {question}"


def main_result(value: str) -> str:
    """What the main agent sees of a sub-agent's answer."""
    return f"Result: {value}"


# A sub-agent's observations name its next tool: small models say what they have just read.


def _sub_question(relation: str, entity: str) -> str:
    return f"Search for the {relation} of {entity}."


def sub_titles(titles: Sequence[str]) -> str:
    """What a sub-agent sees of a search."""
    return "Open one of: " + ", ".join(titles)


def sub_document(title: str, fields: Sequence[tuple[str, str]], relation: str) -> str:
    """What a sub-agent sees of a document that it opened to find `relation`."""
    lines = [title, *(f"{name}: {value}" for name, value in fields), f"Answer: what is the {relation}?"]
    return "\n".join(lines)


def parse(role: str, text: str) -> ToolCall | None:
    """The tool call in one turn of `role`; None when there is none that can be understood."""
    text = text.strip()
    for found in objects(text):
        if (call := _call(role, found.value)) is not None:
            whole = found.start == 0 and found.end == len(text)
            return ToolCall(call.name, call.arguments, call.strict and whole)
    return None


def _call(role: str, found: Mapping[str, object]) -> ToolCall | None:
    name = found.get("name")
    if not isinstance(name, str) or name not in TOOLS[role]:
        return None
    wanted = TOOLS[role][name]
    given = next(
        (v for k in ("arguments", "parameters", "args") if isinstance(v := found.get(k), dict)), found
    )
    values = {argument: _text(given.get(argument)) for argument in wanted}
    if not all(values.values()):
        return None
    strict = (
        found.keys() == {"name", "arguments"}
        and given is found["arguments"]
        and given.keys() == set(wanted)
        and all(given[argument] == value for argument, value in values.items())
    )
    return ToolCall(name, values, strict)


def _text(value: object) -> str:
    """An argument as text: cut, without lone surrogates and control characters, which no tool could take."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python prints
        return ""
    text = text.encode("utf-8", "ignore").decode()
    return "".join(c for c in text if c.isprintable())[:MAX_VALUE].strip()
