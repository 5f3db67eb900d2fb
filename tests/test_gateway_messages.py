"""Anthropic's Messages on the wire: blocks, tools and events."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from mgrpo.gateway.dialect import Asked
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.messages import Messages
from mgrpo.gateway.sse import dumps
from mgrpo.gateway.turn import ToolCall
from tests.gateway_server_kit import CALL, TOOL, WORDS, FakeRollout, reply, run, served

HELLO: dict[str, Any] = {
    "model": "main",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Hello"}],
}
THOUGHT = reply(reasoning="Where?", tool_calls=(CALL,), finish_reason="tool_calls")
BLOCKS = [
    {"type": "thinking", "thinking": "Where?", "signature": ""},
    {"type": "text", "text": WORDS},
    {"type": "tool_use", "id": CALL.id, "name": "find", "input": {"query": "Suva"}},
]


def read(**changes: Any) -> Any:
    return Messages().read(HELLO | changes, Asked())


@pytest.mark.parametrize("base", ["rollout/abc", "rollout/abc/v1"])
def test_an_answer_has_the_shape_of_the_api(base: str) -> None:
    """Anthropic's SDK adds /v1 to its base URL itself, and sends its key in a header of its own."""

    async def test() -> None:
        async with served(FakeRollout(lambda request: THOUGHT)) as at:
            url = f"{at.gateway.url}/{base}/v1/messages"
            at.http.headers.pop("Authorization")
            answer = await at.http.post(url, json=HELLO, headers={"x-api-key": "secret"})
            assert answer.status_code == 200, answer.text
            assert answer.json() == {
                "id": "msg_r1",
                "type": "message",
                "role": "assistant",
                "model": "main",
                "content": BLOCKS,
                "stop_reason": "tool_use",
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 7,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 3,
                },
                "mgrpo": {"role": "main", "invocation": 0},
            }

    run(test())


@pytest.mark.parametrize(("finish", "told"), [("stop", "end_turn"), ("length", "max_tokens")])
def test_why_a_turn_ended(finish: str, told: str) -> None:
    """In the API's words."""

    async def test() -> None:
        async with served(FakeRollout(lambda request: reply(finish_reason=finish, content=""))) as at:
            answer = (await at.post("messages", HELLO)).json()
            assert answer["stop_reason"] == told and answer["content"] == [{"type": "text", "text": ""}]

    run(test())


def test_a_stream_adds_up_to_the_answer() -> None:
    """Each block is opened empty, filled and closed; the reason and the tokens' numbers come at the end."""

    async def test() -> None:
        async with served(FakeRollout(lambda request: THOUGHT)) as at:
            events = await at.events("messages", HELLO)
        assert all(name == data["type"] for name, data in events)
        assert events[0][0] == "message_start" and events[0][1]["message"]["content"] == []
        assert events[0][1]["message"]["usage"]["input_tokens"] == 7
        assert [name for name, _ in events[-2:]] == ["message_delta", "message_stop"]
        assert events[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
        assert events[-2][1]["usage"]["output_tokens"] == 3
        built = []
        for index, block in enumerate(BLOCKS):
            own = [data for _, data in events if data.get("index") == index]
            assert (own[0]["type"], own[-1]["type"]) == ("content_block_start", "content_block_stop")
            found, kind = dict(own[0]["content_block"]), block["type"]
            key, part = {
                "thinking": ("thinking", "thinking"),
                "text": ("text", "text"),
                "tool_use": ("input", "partial_json"),
            }[str(kind)]
            assert not found[key]
            said = "".join(data["delta"][part] for data in own[1:-1])
            built.append(found | {key: json.loads(said) if kind == "tool_use" else said})
        assert built == BLOCKS

    run(test())


def test_blocks_become_messages() -> None:
    """Results of tools are messages of their own, in their order; the assistant's blocks are one message."""
    turn = read(
        system=[
            {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "brief"},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
            {"role": "assistant", "content": BLOCKS},
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": CALL.id,
                        "content": [{"type": "text", "text": "Suva"}],
                    },
                    {"type": "tool_result", "tool_use_id": "b", "is_error": True},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
        tools=[{"name": "find", "description": "Finds.", "input_schema": TOOL["parameters"]}],
        stop_sequences=["END"],
    ).turn
    assert list(turn.messages) == [
        {"role": "system", "content": "Be\nbrief"},
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": WORDS,
            "reasoning_content": "Where?",
            "tool_calls": [dict(CALL.message())],
        },
        {"role": "tool", "tool_call_id": CALL.id, "content": "Suva"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": "And now?"},
    ]
    assert list(turn.tools) == [{"type": "function", "function": TOOL}]
    assert (turn.max_tokens, turn.stop) == (64, ("END",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\]\.type is 'image'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "'document', which is not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id is None"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "ends with the assistant's words"),
        ({"system": 3}, "system is 3"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tool_choice": "any"}, "tool_choice is 'any', expected an object"),
        ({"tool_choice": {"type": "some"}}, r"tool_choice\.type is 'some'"),
        ({"stop_sequences": [3]}, "stop_sequences is a list"),
    ],
)
def test_what_cannot_be_asked_is_named(changes: dict[str, Any], words: str) -> None:
    """400 with the field."""
    with pytest.raises(GatewayError, match=words) as refused:
        read(**changes)
    assert refused.value.status == 400


def test_settings_that_are_not_taken_are_told() -> None:
    """A forced tool, one call at a time, a format; "none" offers no tools."""
    assert read(top_k=40, tool_choice={"type": "any", "disable_parallel_tool_use": True}).overridden == (
        "top_k",
        "tool_choice",
        "tool_choice.disable_parallel_tool_use",
    )
    assert read(output_config={"format": {"type": "json_schema"}, "effort": "low"}).overridden == (
        "output_config.format",
    )
    wanted = read(tools=[{"name": "find"}], tool_choice={"type": "none"}, thinking={"type": "adaptive"})
    assert wanted.turn.tools == [] and wanted.overridden == ()


@pytest.mark.parametrize(
    "arguments",
    ['{"a": ', "[1]", "x", '{"a": NaN}', '{"a": 1e999}', "[" * 9000, '{"a":' * 60 + "1" + "}" * 60],
)
def test_arguments_that_are_no_object_come_back_as_they_were(arguments: str) -> None:
    """A server's own parser may pass them on; a tool's input is an object all the same, and the history the same."""
    call = ToolCall("c1", "find", arguments)
    wanted = read()
    answer = Messages().answer(wanted, reply(tool_calls=(call,)), None)
    blocks = msgspec.json.decode(dumps(answer))["content"]
    assert isinstance(blocks[-1]["input"], dict)
    for event in Messages().events(wanted, reply(tool_calls=(call,)), None):
        assert msgspec.json.decode(event.partition(b"data: ")[2])
    history = [
        *HELLO["messages"],
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": "on"},
    ]
    (said,) = read(messages=history).turn.messages[1]["tool_calls"]
    assert said["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("status", "kind"), [(400, "invalid_request_error"), (404, "not_found_error"), (503, "overloaded_error")]
)
def test_refusals_have_the_shape_of_the_api(status: int, kind: str) -> None:
    """Whatever their status."""

    async def test() -> None:
        def script(request: Any) -> Any:
            raise GatewayError(status, "some_code", "words")

        async with served(FakeRollout(script)) as at:
            answer = await at.post("messages", HELLO)
            assert answer.status_code == status
            told = {"type": kind, "message": "words", "code": "some_code"}
            assert answer.json() == {"type": "error", "error": told}

    run(test())
