"""Chat Completions on the wire: what OpenAI's clients send and what they read."""

from __future__ import annotations

from typing import Any

import pytest

from mgrpo.gateway.chat_completions import ChatCompletions
from mgrpo.gateway.dialect import Asked
from mgrpo.gateway.errors import GatewayError
from tests.gateway_server_kit import CALL, TOOL, WORDS, FakeRollout, reply, run, served

HELLO: dict[str, Any] = {"model": "main", "messages": [{"role": "user", "content": "Hello"}]}
PATH = "chat/completions"


def read(**changes: Any) -> Any:
    return ChatCompletions().read(HELLO | changes, Asked())


def test_a_plain_answer_has_the_shape_of_the_api() -> None:
    """Every field, with the tokens' numbers; nothing in it depends on the clock."""

    async def test() -> None:
        async with served() as at:
            answer = await at.post(PATH, HELLO)
            assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
            assert answer.json() == {
                "id": "chatcmpl-r1",
                "object": "chat.completion",
                "created": 0,
                "model": "main",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": WORDS, "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
                "mgrpo": {"role": "main", "invocation": 0},
            }

    run(test())


def test_thoughts_and_calls_of_an_answer() -> None:
    """Content that says nothing beside a call is null, thoughts stand beside it, arguments are JSON text."""

    async def test() -> None:
        said = reply(content="", reasoning="Where?", tool_calls=(CALL,), finish_reason="tool_calls")
        async with served(FakeRollout(lambda request: said)) as at:
            choice = (await at.post(PATH, HELLO)).json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            assert choice["message"]["content"] is None
            assert choice["message"]["reasoning_content"] == "Where?"
            assert choice["message"]["tool_calls"] == [dict(CALL.message())]

    run(test())


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_adds_up_to_the_answer(usage: bool) -> None:
    """Thoughts, words and calls piece by piece, the reason at the end, numbers of tokens only where they are asked for,
    then [DONE]."""

    async def test() -> None:
        second = CALL.__class__("call00002", "find", "{}")
        said = reply(reasoning="Let me see.", tool_calls=(CALL, second), finish_reason="tool_calls")
        async with served(FakeRollout(lambda request: said)) as at:
            events = await at.events(PATH, HELLO | {"stream_options": {"include_usage": usage}})
        assert all(name is None for name, _ in events) and events[-1][1] == "[DONE]"
        chunks = [data for _, data in events[:-1]]
        assert {(c["id"], c["object"]) for c in chunks} == {("chatcmpl-r1", "chat.completion.chunk")}
        if usage:
            last = chunks.pop()
            assert last["choices"] == [] and last["usage"]["total_tokens"] == 10
            assert all(c["usage"] is None for c in chunks)
        else:
            assert not any("usage" in c for c in chunks)
        choices = [c["choices"][0] for c in chunks]
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        deltas = [c["delta"] for c in choices]
        assert "".join(d.get("content", "") for d in deltas) == WORDS
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "Let me see."
        calls: dict[int, dict[str, str]] = {}
        for part in (part for d in deltas for part in d.get("tool_calls", ())):
            call = calls.setdefault(part["index"], {"arguments": ""})
            call |= {key: part[key] for key in ("id", "type") if key in part}
            call |= {"name": part["function"]["name"]} if "name" in part["function"] else {}
            call["arguments"] += part["function"]["arguments"]
        assert list(calls.values()) == [
            {"id": c.id, "type": "function", "name": "find", "arguments": c.arguments} for c in (CALL, second)
        ]

    run(test())


def test_logprobs_are_those_of_the_sampled_tokens() -> None:
    """Each with its text and bytes, plain and streamed; a part of a character has no bytes."""

    async def test() -> None:
        said = reply(token_ids=(83, 0xFFFD, 228))
        async with served(FakeRollout(lambda request: said)) as at:
            found = (await at.post(PATH, HELLO | {"logprobs": True})).json()["choices"][0]["logprobs"]
            assert [(t["token"], t["logprob"], t["bytes"], t["token_id"]) for t in found["content"]] == [
                ("S", -0.5, [83], 83),
                ("�", -0.25, None, 0xFFFD),
                ("ä", -1.0, [195, 164], 228),
            ]
            assert all(t["top_logprobs"] == [] for t in found["content"])
            events = await at.events(PATH, HELLO | {"logprobs": True})
            assert events[-2][1]["choices"][0]["logprobs"] == found

    run(test())


def test_messages_are_taken_in_every_form_that_sdks_send() -> None:
    """Parts of text become one text, null and missing content the empty one, a developer is the system."""
    turn = read(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}],
            },
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "tool_calls": [CALL.message()], "reasoning": "hm", "audio": None},
            {"role": "tool", "tool_call_id": CALL.id, "content": [{"type": "text", "text": "Suva"}]},
        ],
        tools=[{"type": "function", "function": TOOL | {"strict": True}}],
        max_tokens=9,
        max_completion_tokens=5,
        stop="END",
    ).turn
    assert list(turn.messages) == [
        {"role": "system", "content": "Be\nbrief"},
        {"role": "user", "content": "Hi", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [dict(CALL.message())],
            "reasoning_content": "hm",
        },
        {"role": "tool", "tool_call_id": CALL.id, "content": "Suva"},
    ]
    assert list(turn.tools) == [{"type": "function", "function": TOOL}]
    assert (turn.role, turn.max_tokens, turn.stop) == ("main", 5, ("END",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "model is None"),
        ({"model": 3}, "model is 3, expected a text"),
        ({"messages": "Hello"}, "messages is 'Hello', expected a list"),
        ({"messages": []}, "messages is empty"),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            r"messages\[0\]\.function_call is not supported: use tool_calls",
        ),
        ({"messages": ["Hello"]}, r"messages\[0\] is 'Hello'"),
        ({"messages": [{"role": "bot", "content": ""}]}, r"messages\[0\]\.role is 'bot'.*supported: system"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\]\.content is 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"messages\[0\]\.content\[0\]\.type is 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            r"content\[0\]\.type is 'input_audio'",
        ),
        ({"messages": [{"role": "tool", "content": ""}]}, "tool_call_id is None"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "ends with the assistant's words"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": 1}}]}]},
            r"messages\[0\]\.tool_calls\[0\]\.function\.name is 1",
        ),
        ({"n": 2}, "n is 2, expected 1"),
        ({"n": "1"}, "n is '1', expected a whole number"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number of at least 1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"stream": 1}, "stream is 1, expected true or false"),
        ({"stream_options": []}, "stream_options is a list, expected an object"),
        ({"stop": [""]}, "stop has a text of 0 characters"),
        ({"stop": ["a"] * 17}, "stop has 17 texts, at most 16"),
        ({"stop": {}}, "stop is an object"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]\.type is 'web_search'"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\]\.function\.name is None"),
        ({"tool_choice": "maybe"}, "tool_choice is 'maybe'"),
        ({"top_logprobs": 2}, "top_logprobs is not supported"),
        ({"logit_bias": 3}, "logit_bias is 3"),
        ({"functions": []}, "functions is not supported"),
    ],
)
def test_what_cannot_be_asked_is_named(changes: dict[str, Any], words: str) -> None:
    """400 with the field, before the rollout hears of it."""
    with pytest.raises(GatewayError, match=words) as refused:
        read(**changes)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"temperature": 0.2, "top_p": 0.9, "top_k": 5}, ["temperature", "top_p", "top_k"]),
        ({"presence_penalty": 1, "frequency_penalty": 0.1}, ["frequency_penalty", "presence_penalty"]),
        ({"logit_bias": {"5": -100}}, ["logit_bias"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"tool_choice": "required"}, ["tool_choice"]),
        ({"tool_choice": {"type": "function", "function": {"name": "find"}}}, ["tool_choice"]),
        ({"parallel_tool_calls": False}, ["parallel_tool_calls"]),
        ({"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "top_k": -1, "logit_bias": {}}, []),
        ({"response_format": {"type": "text"}, "tool_choice": "auto", "n": 1, "seed": 3, "what": []}, []),
        ({"temperature": None, "tools": None, "stop": None, "max_tokens": None, "stream": None}, []),
    ],
)
def test_settings_that_are_not_taken_are_told(changes: dict[str, Any], names: list[str]) -> None:
    """Those that would sample from another distribution, and none that changes nothing or is unknown."""
    assert list(read(**changes).overridden) == names


def test_tool_choice_none_offers_no_tools() -> None:
    """And is no setting that is not taken."""
    wanted = read(tools=[{"type": "function", "function": TOOL}], tool_choice="none")
    assert wanted.turn.tools == [] and not wanted.overridden


def test_the_rollout_is_told_of_settings_and_may_refuse_them() -> None:
    """Before its turn begins; then no turn is played."""

    async def test() -> None:
        rollout = FakeRollout()
        async with served(rollout) as at:
            await at.post(PATH, HELLO | {"temperature": 0.1})
            assert rollout.settings == ["temperature"] and len(rollout.asked) == 1
            rollout.refuses = True
            answer = await at.post(PATH, HELLO | {"temperature": 0.1})
            assert answer.status_code == 400 and len(rollout.asked) == 1
            assert answer.json()["error"] == {
                "message": "temperature",
                "type": "invalid_request_error",
                "param": None,
                "code": "unsupported_setting",
            }

    run(test())
