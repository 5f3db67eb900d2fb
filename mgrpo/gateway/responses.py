"""POST /responses: https://platform.openai.com/docs/api-reference/responses.

    input items  --items.py-->  messages  -->  TurnRequest  ...  TurnReply  -->  output items  -->  JSON or events

Thoughts are items of type "reasoning" with their text in `content`. `previous_response_id` names a reply of the same
rollout, kept by Kept, as do items of type "item_reference". As with the API itself, `instructions` are those of one
request and are not carried over. `created_at` is 0: a rollout is a function of its seed and its program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mgrpo.gateway import fields
from mgrpo.gateway.chat_completions import failure
from mgrpo.gateway.dialect import Asked, Decode, Dialect, Wanted, pieces, place
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.fields import Table
from mgrpo.gateway.items import messages_of
from mgrpo.gateway.kept import Kept
from mgrpo.gateway.sse import event
from mgrpo.gateway.turn import TurnReply, TurnRequest
from mgrpo.model.chat import Message

REFUSED = ("background", "conversation", "prompt")


class Responses(Dialect):
    """Of one rollout."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def read(self, body: Table, asked: Asked) -> Wanted:
        speaker = asked.speaker(body)
        for name in REFUSED:
            if body.get(name):
                raise GatewayError(400, "unsupported", f"{name} is not supported")
        if fields.whole(body, "top_logprobs", 0):
            raise GatewayError(
                400, "unsupported", "top_logprobs is not supported: see Chat Completions' logprobs"
            )
        tools, taken = _tools(body)
        instructions = fields.text(body, "instructions")
        previous = fields.text(body, "previous_response_id")
        said = list(messages_of(body.get("input"), self._kept.item))
        history: list[Message] = [*self._kept.history(previous), *said] if previous else said
        system: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
        turn = TurnRequest(
            role=speaker,
            messages=[*system, *fields.checked(history, "input")],
            tools=tools,
            max_tokens=fields.whole(body, "max_output_tokens", 1),
            invocation=asked.invocation,
            repeated=asked.repeated,
        )
        stored = fields.flag(body, "store", default=True)

        def played(reply: TurnReply) -> None:
            if stored:
                self._kept.keep(response_id(reply), previous, said, reply.message(), output(reply))

        return Wanted(
            turn,
            (*fields.overridden(body), *_format(body), *taken),
            stream=fields.flag(body, "stream"),
            echo={
                "instructions": instructions,
                "previous_response_id": previous,
                "max_output_tokens": turn.max_tokens,
                "tools": list(body.get("tools") or ()),
                "tool_choice": body.get("tool_choice") or "auto",
                "parallel_tool_calls": True,
                "metadata": dict(fields.inner(body, "metadata") or {}),
                "store": stored,
            },
            played=played,
        )

    def answer(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Mapping[str, object]:
        whole = reply.finish_reason != "length"
        n = len(reply.token_ids)
        return _head(wanted, reply) | {
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": output(reply),
            "usage": {
                "input_tokens": reply.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": n,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": reply.prompt_tokens + n,
            },
        }

    def events(self, wanted: Wanted, reply: TurnReply, decode: Decode | None) -> Iterator[bytes]:
        answer = self.answer(wanted, reply, decode)
        begun = _head(wanted, reply) | {"status": "in_progress", "output": [], "usage": None}
        for number, data in enumerate(_stream(answer, begun, reply)):
            data = dict(data) | {"sequence_number": number}
            yield event(data, str(data["type"]))

    def error(self, error: GatewayError) -> Mapping[str, object]:
        return failure(error)

    def error_event(self, error: GatewayError) -> bytes:
        told = {"code": error.code, "message": str(error), "param": None, "sequence_number": 0}
        return event({"type": "error", **told, **failure(error)}, "error")


def response_id(reply: TurnReply) -> str:
    """What `previous_response_id` names."""
    return f"resp_{reply.id}"


def output(reply: TurnReply) -> list[dict[str, Any]]:
    """The reply as output items: thoughts, words, calls."""
    status = "incomplete" if reply.finish_reason == "length" else "completed"
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        thoughts = [{"type": "reasoning_text", "text": reply.reasoning}]
        items.append({"id": f"rs_{reply.id}", "type": "reasoning", "summary": [], "content": thoughts})
    if reply.content or not reply.tool_calls:
        part = {"type": "output_text", "text": reply.content, "annotations": [], "logprobs": []}
        items.append({"id": f"msg_{reply.id}", "type": "message", "role": "assistant", "content": [part]})
    for call in reply.tool_calls:
        told = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        items.append({"id": f"fc_{call.id}", "type": "function_call"} | told)
    return [item | {"status": status} for item in items]


def _head(wanted: Wanted, reply: TurnReply) -> dict[str, object]:
    return {
        "id": response_id(reply),
        "object": "response",
        "created_at": 0,
        "model": reply.role,
        "error": None,
        "incomplete_details": None,
        "temperature": None,
        "top_p": None,
        **wanted.echo,
        "mgrpo": place(reply),
    }


def _stream(answer: Table, begun: Table, reply: TurnReply) -> Iterator[Mapping[str, object]]:
    """All events, without their numbers."""
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(answer["output"]):
        where: dict[str, object] = {"item_id": item["id"], "output_index": index}
        yield _item("added", index, _opened(item))
        if item["type"] == "function_call":
            yield from _call_events(item, where)
        else:
            yield from _text_events(item, where | {"content_index": 0})
        yield _item("done", index, item)
    kind = "response.completed" if answer["status"] == "completed" else "response.incomplete"
    yield {"type": kind, "response": answer}


def _item(what: str, index: int, item: Table) -> Mapping[str, object]:
    return {"type": f"response.output_item.{what}", "output_index": index, "item": item}


def _opened(item: Table) -> Mapping[str, object]:
    """An item before anything of it was sent."""
    empty: dict[str, object] = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    return {**item, **empty, "status": "in_progress"}


def _call_events(item: Table, where: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    for piece in pieces(item["arguments"], 2):
        yield {"type": "response.function_call_arguments.delta", "delta": piece, **where}
    told = {"name": item["name"], "arguments": item["arguments"]}
    yield {"type": "response.function_call_arguments.done", **told, **where}


def _text_events(item: Table, where: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    (part,) = item["content"]
    yield {"type": "response.content_part.added", "part": {**part, "text": ""}, **where}
    more: dict[str, object] = {"logprobs": []} if part["type"] == "output_text" else {}
    for piece in pieces(part["text"]):
        yield {"type": f"response.{part['type']}.delta", "delta": piece, **where, **more}
    yield {"type": f"response.{part['type']}.done", "text": part["text"], **where, **more}
    yield {"type": "response.content_part.done", "part": part, **where}


def _tools(body: Table) -> tuple[Sequence[Table], list[str]]:
    """(the tools that are offered, the settings about them that are not taken)."""
    return fields.chosen(body, fields.tools(body, "function", "parameters"))


def _format(body: Table) -> Iterator[str]:
    form = fields.inner(fields.inner(body, "text") or {}, "format", "text.")
    if form and fields.text(form, "type", "text.format.") != "text":
        yield "text.format"
