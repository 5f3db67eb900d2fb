"""Items of the Responses API as messages of Chat Completions.

What the assistant did in one turn is several items there (thoughts, words, calls) and one message here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mgrpo.gateway import fields
from mgrpo.gateway.fields import Table
from mgrpo.model.chat import Message

ROLES = ("system", "user", "assistant")
PARTS = ("input_text", "output_text", "text", "refusal")
KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def messages_of(said: object, item: Callable[[str], Table]) -> Iterator[Message]:
    """The messages of `input`, which is a text or a list of items. item: the kept item of an id, for references to
    it; it raises GatewayError where there is none. So does this for whatever else cannot be carried."""
    if isinstance(said, str):
        yield {"role": "user", "content": said}
        return
    if not isinstance(said, list):
        raise fields.refusal("input", said, "a text or a list of items")
    turn: dict[str, Any] | None = None  # the assistant's, as far as it is known
    for number, row in enumerate(fields.rows({"input": said}, "input", fields.MAX_MESSAGES)):
        where = f"input[{number}]."
        if _kind(row, where) == "item_reference":
            row = item(fields.needed(row, "id", where))
        kind = _kind(row, where)
        if kind in ("function_call", "reasoning") or row.get("role") == "assistant":
            if turn is None or not _goes_on(turn, kind):
                if turn is not None:
                    yield turn
                turn = {"role": "assistant", "content": ""}
            _add(turn, row, kind, where)
            continue
        if turn is not None:
            yield turn
            turn = None
        yield _other(row, kind, where)
    if turn is not None:
        yield turn


def _kind(row: Table, where: str) -> str:
    kind = fields.text(row, "type", where) or ("message" if "role" in row else "item_reference")
    if not row.get("type") and "role" not in row and "id" not in row:
        raise fields.refusal(f"{where}type", None, f"one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise fields.unsupported(f"{where}type", kind, KINDS)
    return kind


def _goes_on(turn: Mapping[str, Any], kind: str) -> bool:
    """Whether an item of this kind belongs to the same turn: thoughts come first, then words, then calls."""
    return kind == "function_call" or (not turn["content"] and "tool_calls" not in turn)


def _add(turn: dict[str, Any], row: Table, kind: str, where: str) -> None:
    if kind == "reasoning":
        thoughts = fields.content(row.get("content"), f"{where}content", ("reasoning_text",), "")
        thoughts = thoughts or fields.content(row.get("summary"), f"{where}summary", ("summary_text",))
        if thoughts:
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thoughts
    elif kind == "function_call":
        call_id, name = (fields.needed(row, key, where) for key in ("call_id", "name"))
        arguments = fields.text(row, "arguments", where) or "{}"
        turn.setdefault("tool_calls", []).append(fields.call(call_id, name, arguments))
    else:
        turn["content"] = fields.content(row.get("content"), f"{where}content", PARTS, "")


def _other(row: Table, kind: str, where: str) -> Message:
    """What is not the assistant's."""
    if kind == "function_call_output":
        result = fields.content(row.get("output"), f"{where}output", PARTS)
        return {"role": "tool", "tool_call_id": fields.needed(row, "call_id", where), "content": result}
    role = fields.role_of(row, where)
    if role not in ROLES:
        raise fields.unsupported(f"{where}role", role, ROLES)
    return {"role": role, "content": fields.content(row.get("content"), f"{where}content", PARTS)}
