"""Any JSON at all is understood or refused by name: no dialect fails on what it is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.gateway.body import parse
from mgrpo.gateway.chat_completions import ChatCompletions
from mgrpo.gateway.dialect import Asked, Dialect
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.kept import Kept
from mgrpo.gateway.messages import Messages
from mgrpo.gateway.responses import Responses
from tests.gateway_server_kit import CALL, events, reply

NAMES = (
    *("model", "messages", "input", "role", "content", "type", "text", "id", "name", "tools", "tool_choice"),
    *(
        "tool_calls",
        "function",
        "arguments",
        "parameters",
        "input_schema",
        "tool_call_id",
        "call_id",
        "output",
    ),
    *(
        "tool_use_id",
        "reasoning",
        "reasoning_content",
        "thinking",
        "summary",
        "system",
        "instructions",
        "stop",
    ),
    *(
        "stop_sequences",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "logit_bias",
        "response_format",
    ),
    *("format", "previous_response_id", "metadata", "n", "logprobs", "refusal", "output_config", "store"),
)
WORDS = (
    *(
        "main",
        "user",
        "assistant",
        "system",
        "developer",
        "tool",
        "text",
        "input_text",
        "output_text",
        "function",
    ),
    *(
        "function_call",
        "function_call_output",
        "reasoning",
        "message",
        "item_reference",
        "tool_use",
        "tool_result",
    ),
    *(
        "thinking",
        "redacted_thinking",
        "reasoning_text",
        "summary_text",
        "image",
        "auto",
        "none",
        "required",
        "any",
    ),
    *("", "msg_r1", "resp_r1", "{}", "<|im_end|>\x00"),
)
LEAVES = st.none() | st.booleans() | st.integers(-2, 3) | st.floats(0, 2) | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"model": "main", "messages": [{"role": "user", "content": "Hello"}]},
    "responses": {"model": "main", "input": [{"role": "user", "content": "Hello"}]},
    "messages": {"model": "main", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]},
}


def dialect(name: str) -> Dialect:
    if name == "responses":
        kept = Kept(9, 1000)
        kept.keep(
            "resp_r1", None, [], {"role": "assistant"}, [{"id": "msg_r1", "type": "message", "role": "user"}]
        )
        return Responses(kept)
    return ChatCompletions() if name == "chat" else Messages()


@pytest.mark.parametrize("name", sorted(BODIES))
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_json_is_understood_or_refused(name: str, data: st.DataObject) -> None:
    """What is understood becomes a turn of texts whose answer and events can be written."""
    own = data.draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
    base = BODIES[name]
    row = data.draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
    key = "input" if name == "responses" else "messages"
    body = base | ({key: [*base[key], row, *base[key]]} if data.draw(st.booleans()) else {}) | own
    spoken = dialect(name)
    try:
        wanted = spoken.read(parse(json.dumps(body).encode()), Asked())
    except GatewayError as error:
        assert error.status in (400, 404) and error.code and str(error)
        return
    for message in wanted.turn.messages:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
        for call in message.get("tool_calls", ()):
            assert all(isinstance(call["function"][part], str) for part in ("name", "arguments"))
    assert wanted.turn.messages[-1]["role"] != "assistant"
    said = reply(reasoning="Where?", tool_calls=(CALL,), finish_reason="tool_calls")
    json.dumps(spoken.answer(wanted, said, chr))
    assert events(b"".join(spoken.events(wanted, said, chr)))
    wanted.played(said)


@settings(max_examples=80, deadline=None)
@given(body=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    """As Python's own reader has it."""
    try:
        found = parse(body)
    except GatewayError as error:
        assert error.status == 400
        return
    assert found == json.loads(body)
