"""Fields of a request's JSON, checked: what is of another type is a 400 that names the field.

Fields that nobody here knows are ignored, as SDKs of other years send them. A field that is null is one that is not
there. where: the path to the table, e.g. "messages[2].", so that messages name "messages[2].content".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mgrpo.engines.base import MAX_STOP_LENGTH, MAX_STOPS
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.turn import ToolCall
from mgrpo.model.chat import Message

Table = Mapping[str, Any]

MAX_MESSAGES = 20_000
MAX_TOOLS = 1_000
PENALTIES: Mapping[str, tuple[float, ...]] = {
    "temperature": (),
    "top_p": (1.0,),
    "top_k": (0.0, -1.0),
    "min_p": (0.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (1.0,),
}
"""Numbers that shape the sampling distribution -> the values at which they do nothing."""


def refusal(field: str, value: object, expected: str) -> GatewayError:
    """400 for a field that is not what it should be."""
    shown = repr(value) if isinstance(value, bool | int | float | str | None) else _KINDS.get(type(value), "")
    return GatewayError(400, "invalid_value", f"{field} is {shown:.100}, expected {expected}")


_KINDS: Mapping[type, str] = {dict: "an object", list: "a list"}


def text(table: Table, name: str, where: str = "") -> str | None:
    """A text, or None where there is none."""
    value = table.get(name)
    if not isinstance(value, str | None):
        raise refusal(f"{where}{name}", value, "a text")
    return value


def needed(table: Table, name: str, where: str = "") -> str:
    """A text that has to be there and says something."""
    value = text(table, name, where)
    if not value:
        raise refusal(f"{where}{name}", value, "a text that is not empty")
    return value


def whole(table: Table, name: str, low: int, where: str = "") -> int | None:
    """A whole number of at least `low`."""
    value = table.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 1 << 53:
        raise refusal(f"{where}{name}", value, f"a whole number of at least {low}")
    return value


def number(table: Table, name: str, where: str = "") -> float | None:
    """Any number."""
    value = table.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise refusal(f"{where}{name}", value, "a number")
    return value


def flag(table: Table, name: str, default: bool = False, where: str = "") -> bool:
    """True or false."""
    value = table.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refusal(f"{where}{name}", value, "true or false")
    return value


def inner(table: Table, name: str, where: str = "") -> Table | None:
    """An object."""
    value = table.get(name)
    if not isinstance(value, dict | None):
        raise refusal(f"{where}{name}", value, "an object")
    return value


def rows(table: Table, name: str, most: int, where: str = "") -> Sequence[Table]:
    """A list of at most `most` objects; empty where there is none."""
    value = table.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise refusal(f"{where}{name}", value, "a list of objects")
    if len(value) > most:
        raise GatewayError(400, "invalid_value", f"{where}{name} has {len(value)} entries, at most {most}")
    for place, row in enumerate(value):
        if not isinstance(row, dict):
            raise refusal(f"{where}{name}[{place}]", row, "an object")
    return value


def texts(table: Table, name: str) -> tuple[str, ...]:
    """Stop texts: one, or a list of them."""
    value = table.get(name)
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise refusal(name, value, "a text or a list of texts")
    if len(found) > MAX_STOPS:
        raise GatewayError(400, "invalid_value", f"{name} has {len(found)} texts, at most {MAX_STOPS}")
    for entry in found:
        if not 0 < len(entry) <= MAX_STOP_LENGTH:
            raise GatewayError(
                400,
                "invalid_value",
                f"{name} has a text of {len(entry)} characters, expected 1 to {MAX_STOP_LENGTH}",
            )
    return tuple(found)


def content(value: object, where: str, kinds: Sequence[str], join: str = "\n") -> str:
    """A message's content as one text: it is a text, or parts of the `kinds` named. null is "". Parts of any other
    kind (images, audio, files) are refused by name."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refusal(where, value, "a text or a list of parts")
    found = []
    for place, part in enumerate(value):
        if isinstance(part, str):
            found.append(part)
            continue
        at = f"{where}[{place}]."
        if not isinstance(part, dict):
            raise refusal(at[:-1], part, "an object")
        kind = text(part, "type", at) or "text"
        if kind not in kinds:
            raise unsupported(f"{at}type", kind, kinds)
        found.append(text(part, "refusal" if kind == "refusal" else "text", at) or "")
    return join.join(found)


def unsupported(field: str, kind: str, kinds: Sequence[str]) -> GatewayError:
    """400 for a part, item or tool of a kind that policies here cannot be given."""
    return GatewayError(
        400, "unsupported", f"{field} is {kind!r:.60}, which is not supported; supported: {', '.join(kinds)}"
    )


def role_of(table: Table, where: str) -> str:
    """Who speaks: "developer" is the system's newer name."""
    role = needed(table, "role", where)
    return "system" if role == "developer" else role


def tools(body: Table, kind: str, parameters: str, below: str = "") -> list[Table]:
    """The tools of a request in the form of Chat Completions. kind: the one type that is taken. parameters: what the
    dialect calls their schema. below: the table in which it describes a tool."""
    found = []
    for place, row in enumerate(rows(body, "tools", MAX_TOOLS)):
        where = f"tools[{place}]."
        if (given := text(row, "type", where) or kind) != kind:
            raise unsupported(f"{where}type", given, (kind,))
        told, at = (inner(row, below, where) or {}, f"{where}{below}.") if below else (row, where)
        name, description = needed(told, "name", at), text(told, "description", at)
        found.append(function(name, description, inner(told, parameters, at)))
    return found


def function(name: str, description: str | None, parameters: Table | None) -> Table:
    """A tool in the form of Chat Completions."""
    told: dict[str, object] = {"name": name}
    if description is not None:
        told["description"] = description
    told["parameters"] = parameters if parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": told}


def call(identity: str, name: str, arguments: str) -> Table:
    """A tool call of a message in the form of Chat Completions."""
    return ToolCall(identity, name, arguments).message()


def checked(messages: Sequence[Message], field: str) -> Sequence[Message]:
    """A history that a turn can follow. Raises GatewayError for none, and for one that ends with the assistant's own
    words: what the policy says is sampled, never begun by the program."""
    if not messages:
        raise GatewayError(400, "invalid_value", f"{field} is empty, expected at least one message")
    if messages[-1].get("role") == "assistant":
        raise GatewayError(
            400, "unsupported", f"{field} ends with the assistant's words: prefilling is not supported"
        )
    return messages


def overridden(body: Table) -> Iterator[str]:
    """Names of the numbers that would sample from another distribution than the one that is trained."""
    for name, neutral in PENALTIES.items():
        value = number(body, name)
        if value is not None and value not in neutral:
            yield name
    if inner(body, "logit_bias"):
        yield "logit_bias"


def chosen(body: Table, tools: list[Table]) -> tuple[list[Table], list[str]]:
    """The tools that OpenAI's tool_choice leaves, and the names of settings that are not taken."""
    taken: list[str] = []
    choice = body.get("tool_choice")
    if choice == "none":
        tools = []
    elif isinstance(choice, dict) or choice == "required":
        taken.append("tool_choice")
    elif choice not in (None, "auto"):
        raise refusal("tool_choice", choice, 'one of "none", "auto", "required" or an object')
    if not flag(body, "parallel_tool_calls", default=True):
        taken.append("parallel_tool_calls")
    return tools, taken
