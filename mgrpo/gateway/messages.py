"""POST /messages: https://docs.anthropic.com/en/api/messages. Thoughts are blocks of type "thinking"."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mgrpo.gateway import fields
from mgrpo.gateway.body import MAX_DEPTH, is_deeper
from mgrpo.gateway.dialect import Asked, Decode, Dialect, Wanted, pieces, place
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.fields import Table
from mgrpo.gateway.history import read_json
from mgrpo.gateway.sse import event
from mgrpo.gateway.turn import TurnReply, TurnRequest
from mgrpo.model.chat import Message

ROLES = ("user", "assistant", "system")
USER, ASSISTANT = ("text", "tool_result"), ("text", "thinking", "redacted_thinking", "tool_use")
UNREAD = "arguments_that_are_no_json_object"
"""The one key of a tool's input where what was sampled is no JSON object, which is all that the API can say."""
STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Messages(Dialect):
    """Without state."""

    def read(self, body: Table, asked: Asked) -> Wanted:
        tools, taken = _tools(body)
        system = fields.content(body.get("system"), "system", ("text",))
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        turn = TurnRequest(
            role=asked.speaker(body),
            messages=[*opening, *fields.checked(list(_messages(body)), "messages")],
            tools=tools,
            max_tokens=fields.whole(body, "max_tokens", 1),
            stop=fields.texts(body, "stop_sequences"),
            invocation=asked.invocation,
            repeated=asked.repeated,
        )
        return Wanted(
            turn,
            (*fields.overridden(body), *_format(body), *taken),
            stream=fields.flag(body, "stream"),
        )

    def answer(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Mapping[str, object]:
        return _head(reply) | {
            "content": list(_blocks(reply)),
            "stop_reason": STOPS[reply.finish_reason],
            "usage": _usage(reply),
        }

    def events(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Iterator[bytes]:
        begun = _head(reply) | {"content": [], "usage": _usage(reply) | {"output_tokens": 0}}
        yield _event("message_start", message=begun)
        for index, block in enumerate(_blocks(reply)):
            yield _event("content_block_start", index=index, content_block={**block, **_EMPTY[block["type"]]})
            for delta in _deltas(block):
                yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        delta = {"stop_reason": STOPS[reply.finish_reason], "stop_sequence": None}
        yield _event("message_delta", delta=delta, usage=_usage(reply))
        yield _event("message_stop")

    def error(self, error: GatewayError) -> Mapping[str, object]:
        kind = ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(error), "code": error.code}}

    def error_event(self, error: GatewayError) -> bytes:
        return event(self.error(error), "error")


_EMPTY: Mapping[str, Mapping[str, object]] = {
    "text": {"text": ""},
    "thinking": {"thinking": ""},
    "tool_use": {"input": {}},
}


def _event(kind: str, **told: object) -> bytes:
    return event({"type": kind, **told}, kind)


def _head(reply: TurnReply) -> dict[str, object]:
    return {
        "id": f"msg_{reply.id}",
        "type": "message",
        "role": "assistant",
        "model": reply.role,
        "stop_reason": None,
        "stop_sequence": None,
        "mgrpo": place(reply),
    }


def _usage(reply: TurnReply) -> dict[str, object]:
    return {
        "input_tokens": reply.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": len(reply.token_ids),
    }


def _blocks(reply: TurnReply) -> Iterator[dict[str, Any]]:
    if reply.reasoning:
        yield {"type": "thinking", "thinking": reply.reasoning, "signature": ""}
    if reply.content or not reply.tool_calls:
        yield {"type": "text", "text": reply.content}
    for call in reply.tool_calls:
        yield {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}


def _input(arguments: str) -> Mapping[str, Any]:
    """Arguments as an object. A server's own parser may pass on what is none: see UNREAD."""
    try:
        value = read_json(arguments)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and not is_deeper(
        value, MAX_DEPTH // 2
    ):  # it stands within others when it comes back
        return value
    return {UNREAD: arguments}


def _deltas(block: Table) -> Iterator[Mapping[str, object]]:
    if block["type"] == "text":
        yield from ({"type": "text_delta", "text": piece} for piece in pieces(block["text"]))
    elif block["type"] == "thinking":
        yield from ({"type": "thinking_delta", "thinking": piece} for piece in pieces(block["thinking"]))
    else:
        told = json.dumps(block["input"], ensure_ascii=False)
        yield from ({"type": "input_json_delta", "partial_json": piece} for piece in pieces(told, 2))


def _messages(body: Table) -> Iterator[Message]:
    for number, row in enumerate(fields.rows(body, "messages", fields.MAX_MESSAGES)):
        where = f"messages[{number}]."
        role = fields.role_of(row, where)
        if role not in ROLES:
            raise fields.unsupported(f"{where}role", role, ROLES)
        said = row.get("content")
        if not isinstance(said, list):
            yield {"role": role, "content": fields.content(said, f"{where}content", ("text",))}
        elif role == "assistant":
            yield _assistant(fields.rows(row, "content", fields.MAX_MESSAGES, where), f"{where}content")
        else:
            yield from _said(role, fields.rows(row, "content", fields.MAX_MESSAGES, where), f"{where}content")


def _said(role: str, blocks: Sequence[Table], where: str) -> Iterator[Message]:
    """A user's message: results of tools are messages of their own, what stands between them others."""
    words: list[str] = []
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]."
        kind = fields.text(block, "type", at) or "text"
        if kind == "text":
            words.append(fields.text(block, "text", at) or "")
        elif kind != "tool_result":
            raise fields.unsupported(f"{at}type", kind, USER)
        else:
            if words:
                yield {"role": role, "content": "\n".join(words)}
                words = []
            result = fields.content(block.get("content"), f"{at}content", ("text",))
            answered = fields.needed(block, "tool_use_id", at)
            yield {"role": "tool", "tool_call_id": answered, "content": result}
    if words or not blocks:
        yield {"role": role, "content": "\n".join(words)}


def _assistant(blocks: Sequence[Table], where: str) -> Message:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for number, block in enumerate(blocks):
        at = f"{where}[{number}]."
        kind = fields.text(block, "type", at) or "text"
        if kind == "text":
            message["content"] += fields.text(block, "text", at) or ""
        elif kind == "thinking":
            thought = fields.text(block, "thinking", at) or ""
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            given = fields.inner(block, "input", at) or {}
            unread = given.get(UNREAD) if len(given) == 1 else None
            arguments = unread if isinstance(unread, str) else json.dumps(given, ensure_ascii=False)
            told = fields.call(fields.needed(block, "id", at), fields.needed(block, "name", at), arguments)
            message.setdefault("tool_calls", []).append(told)
        elif kind != "redacted_thinking":
            raise fields.unsupported(f"{at}type", kind, ASSISTANT)
    return message


def _tools(body: Table) -> tuple[Sequence[Table], list[str]]:
    """(the tools that are offered, the settings about them that are not taken)."""
    tools = fields.tools(body, "custom", "input_schema")
    choice = fields.inner(body, "tool_choice") or {"type": "auto"}
    kind = fields.needed(choice, "type", "tool_choice.")
    if kind not in ("auto", "any", "tool", "none"):
        raise fields.refusal("tool_choice.type", kind, 'one of "auto", "any", "tool", "none"')
    taken = ["tool_choice"] if kind in ("any", "tool") else []
    if fields.flag(choice, "disable_parallel_tool_use", where="tool_choice."):
        taken.append("tool_choice.disable_parallel_tool_use")
    return ([] if kind == "none" else tools), taken


def _format(body: Table) -> Iterator[str]:
    if body.get("output_format"):
        yield "output_format"
    if (fields.inner(body, "output_config") or {}).get("format"):
        yield "output_config.format"
