"""POST /chat/completions: https://platform.openai.com/docs/api-reference/chat.

Beside the API's own fields an answer has `reasoning_content` in its message, where the policy thought, and `mgrpo`
{role, invocation}: which conversation it was. `created` is 0: a rollout is a function of its seed and its program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mgrpo.gateway import fields
from mgrpo.gateway.dialect import Asked, Decode, Dialect, Wanted, pieces, place
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.fields import Table
from mgrpo.gateway.sse import DONE, event
from mgrpo.gateway.turn import TurnReply, TurnRequest
from mgrpo.model.chat import Message

ROLES = ("system", "user", "assistant", "tool")
PARTS = ("text", "refusal")
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ChatCompletions(Dialect):
    """Without state."""

    def read(self, body: Table, asked: Asked) -> Wanted:
        speaker = asked.speaker(body)
        for old in ("functions", "function_call"):
            if body.get(old) is not None:
                raise GatewayError(400, "unsupported", f"{old} is not supported: use tools and tool_choice")
        if (n := fields.whole(body, "n", 1)) is not None and n > 1:
            raise GatewayError(
                400, "unsupported", f"n is {n}, expected 1: a rollout has one answer to each turn"
            )
        if fields.whole(body, "top_logprobs", 0):
            raise GatewayError(
                400, "unsupported", "top_logprobs is not supported: only sampled tokens have any"
            )
        tools, taken = _tools(body)
        most = fields.whole(body, "max_completion_tokens", 1)
        options = fields.inner(body, "stream_options") or {}
        turn = TurnRequest(
            role=speaker,
            messages=fields.checked(list(_messages(body)), "messages"),
            tools=tools,
            max_tokens=fields.whole(body, "max_tokens", 1) if most is None else most,
            stop=fields.texts(body, "stop"),
            invocation=asked.invocation,
            repeated=asked.repeated,
        )
        return Wanted(
            turn,
            (*fields.overridden(body), *_format(body), *taken),
            stream=fields.flag(body, "stream"),
            usage=fields.flag(options, "include_usage", where="stream_options."),
            logprobs=fields.flag(body, "logprobs"),
        )

    def answer(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Mapping[str, object]:
        message = dict(reply.message())
        if reply.tool_calls and not reply.content:
            message["content"] = None
        choice = {
            "index": 0,
            "message": message | {"refusal": None},
            "logprobs": _logprobs(reply, decode),
            "finish_reason": reply.finish_reason,
        }
        return _head(reply, "chat.completion") | {
            "choices": [choice],
            "usage": usage(reply),
            "mgrpo": place(reply),
        }

    def events(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Iterator[bytes]:
        head = _head(reply, "chat.completion.chunk")
        if wanted.usage:
            head["usage"] = None

        def chunk(delta: Mapping[str, object], finish: str | None = None, **more: object) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish} | more
            return event(head | {"choices": [choice], "mgrpo": place(reply)})

        yield chunk({"role": "assistant", "content": ""})
        for piece in pieces(reply.reasoning):
            yield chunk({"reasoning_content": piece})
        for piece in pieces(reply.content):
            yield chunk({"content": piece})
        for index, call in enumerate(reply.tool_calls):
            opened = dict(call.message()) | {"function": {"name": call.name, "arguments": ""}}
            yield chunk({"tool_calls": [{"index": index} | opened]})
            for piece in pieces(call.arguments, 2):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
        yield chunk({}, reply.finish_reason, logprobs=_logprobs(reply, decode))
        if wanted.usage:
            yield event(head | {"choices": [], "usage": usage(reply)})
        yield DONE

    def error(self, error: GatewayError) -> Mapping[str, object]:
        return failure(error)

    def error_event(self, error: GatewayError) -> bytes:
        return event(failure(error))


def failure(error: GatewayError) -> Mapping[str, object]:
    """A refusal as OpenAI's APIs write it."""
    kind = ERRORS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def usage(reply: TurnReply) -> Mapping[str, object]:
    """Tokens of the history and of the turn."""
    n = len(reply.token_ids)
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": n,
        "total_tokens": reply.prompt_tokens + n,
    }


def _head(reply: TurnReply, kind: str) -> dict[str, object]:
    return {"id": f"chatcmpl-{reply.id}", "object": kind, "created": 0, "model": reply.role}


def _logprobs(reply: TurnReply, decode: Decode | None) -> Mapping[str, object] | None:
    """Of all sampled tokens, those of thoughts, tool calls and the end of the turn included."""
    if decode is None:
        return None
    return {
        "content": [_logprob(*pair, decode) for pair in zip(reply.token_ids, reply.logprobs, strict=True)]
    }


def _logprob(token: int, logprob: float, decode: Decode) -> Mapping[str, object]:
    said = decode(token)
    raw = None if "�" in said else list(said.encode())  # a token may hold a part of a character
    return {"token": said, "logprob": logprob, "bytes": raw, "top_logprobs": [], "token_id": token}


def _messages(body: Table) -> Iterator[Message]:
    for number, row in enumerate(fields.rows(body, "messages", fields.MAX_MESSAGES)):
        where = f"messages[{number}]."
        role = fields.role_of(row, where)
        if role not in ROLES:
            raise fields.unsupported(f"{where}role", role, ROLES)
        own = role == "assistant"
        said = fields.content(row.get("content"), f"{where}content", PARTS, "" if own else "\n")
        message: dict[str, Any] = {"role": role, "content": said}
        if (name := fields.text(row, "name", where)) is not None:
            message["name"] = name
        if role == "tool":
            message["tool_call_id"] = fields.needed(row, "tool_call_id", where)
        if own:
            message |= _turn(row, where)
        yield message


def _turn(row: Table, where: str) -> Mapping[str, object]:
    """What only the assistant's messages have."""
    if row.get("function_call") is not None:
        raise GatewayError(400, "unsupported", f"{where}function_call is not supported: use tool_calls")
    found: dict[str, object] = {}
    calls = []
    for number, call in enumerate(fields.rows(row, "tool_calls", fields.MAX_TOOLS, where)):
        at = f"{where}tool_calls[{number}]."
        if (kind := fields.text(call, "type", at) or "function") != "function":
            raise fields.unsupported(f"{at}type", kind, ("function",))
        told = fields.inner(call, "function", at) or {}
        name = fields.needed(told, "name", f"{at}function.")
        arguments = fields.text(told, "arguments", f"{at}function.") or "{}"
        calls.append(fields.call(fields.needed(call, "id", at), name, arguments))
    if calls:
        found["tool_calls"] = calls
    thoughts = fields.text(row, "reasoning_content", where) or fields.text(row, "reasoning", where)
    if thoughts:
        found["reasoning_content"] = thoughts
    return found


def _tools(body: Table) -> tuple[list[Table], list[str]]:
    """(the tools that are offered, the settings about them that are not taken)."""
    return fields.chosen(body, fields.tools(body, "function", "parameters", "function"))


def _format(body: Table) -> Iterator[str]:
    form = fields.inner(body, "response_format")
    if form and fields.text(form, "type", "response_format.") != "text":
        yield "response_format"
