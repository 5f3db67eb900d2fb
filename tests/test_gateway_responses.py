"""The Responses API on the wire: items, kept replies and events."""

from __future__ import annotations

from typing import Any

import pytest

from mgrpo.gateway.dialect import Asked
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.kept import Kept
from mgrpo.gateway.responses import Responses, output, response_id
from tests.gateway_server_kit import CALL, TOOL, WORDS, FakeRollout, reply, run, served

HELLO: dict[str, Any] = {"model": "main", "input": "Hello"}
THOUGHT = reply(reasoning="Where?", tool_calls=(CALL,), finish_reason="tool_calls")


def read(kept: Kept | None = None, **changes: Any) -> Any:
    return Responses(kept or Kept(9, 10_000)).read(HELLO | changes, Asked())


def test_an_answer_has_the_shape_of_the_api() -> None:
    """One message, complete, with the tokens' numbers and what was asked."""

    async def test() -> None:
        async with served() as at:
            answer = (
                await at.post("responses", HELLO | {"instructions": "Be brief.", "metadata": {"a": "b"}})
            ).json()
        assert answer["id"] == "resp_r1" and answer["object"] == "response" and answer["created_at"] == 0
        assert answer["status"] == "completed" and answer["incomplete_details"] is None
        assert answer["instructions"] == "Be brief." and answer["metadata"] == {"a": "b"}
        assert answer["output"] == [
            {
                "id": "msg_r1",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": WORDS, "annotations": [], "logprobs": []}],
            }
        ]
        assert answer["usage"]["input_tokens"] == 7 and answer["usage"]["total_tokens"] == 10
        assert answer["mgrpo"] == {"role": "main", "invocation": 0}

    run(test())


def test_an_answer_that_was_cut_says_so() -> None:
    """incomplete, by the number of tokens, plain and streamed."""

    async def test() -> None:
        async with served(FakeRollout(lambda request: reply(finish_reason="length"))) as at:
            answer = (await at.post("responses", HELLO | {"max_output_tokens": 3})).json()
            assert answer["status"] == "incomplete"
            assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
            assert at.rollout.asked[0].max_tokens == 3
            events = await at.events("responses", HELLO)
            assert events[-1][0] == "response.incomplete"

    run(test())


def test_a_stream_adds_up_to_the_answer() -> None:
    """Events in the API's order, numbered, each item from its opening to its end equal to that of the plain answer."""

    async def test() -> None:
        async with served(FakeRollout(lambda request: THOUGHT)) as at:
            whole = (await at.post("responses", HELLO)).json()
            events = await at.events("responses", HELLO)
        assert all(name == data["type"] for name, data in events)
        assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
        names = [name for name, _ in events]
        assert names[:2] == ["response.created", "response.in_progress"] and names[-1] == "response.completed"
        assert (
            events[0][1]["response"]["status"] == "in_progress" and events[0][1]["response"]["output"] == []
        )
        assert events[-1][1]["response"] == whole
        assert [i["type"] for i in whole["output"]] == ["reasoning", "message", "function_call"]
        for index, item in enumerate(whole["output"]):
            own = [data for _, data in events[2:-1] if data["output_index"] == index]
            assert own[0]["type"] == "response.output_item.added"
            assert own[0]["item"]["status"] == "in_progress" and own[0]["item"]["id"] == item["id"]
            assert own[-1] == own[-1] | {"type": "response.output_item.done", "item": item}
            said = "".join(data["delta"] for data in own if data["type"].endswith(".delta"))
            assert said == (item["content"][0]["text"] if "content" in item else item["arguments"])
            assert {data["item_id"] for data in own[1:-1]} == {item["id"]}

    run(test())


def test_items_become_messages() -> None:
    """Thoughts, words and calls of one turn are one message; a turn ends where something is said to the assistant."""
    turn = read(
        instructions="Be brief.",
        input=[
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "Where"}, {"type": "input_text", "text": "is it"}],
            },
            *output(THOUGHT),
            {"type": "function_call", "call_id": "b", "name": "find", "arguments": "{}"},
            {"type": "function_call_output", "call_id": CALL.id, "output": "Suva"},
            {
                "type": "function_call_output",
                "call_id": "b",
                "output": [{"type": "input_text", "text": "Fiji"}],
            },
            {"type": "reasoning", "id": "x", "summary": [], "encrypted_content": "zzz"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Su"}]},
            {"type": "message", "role": "assistant", "content": "va"},
            {"type": "message", "role": "developer", "content": "Go on"},
        ],
        tools=[{"type": "function", "strict": True, **TOOL}],
    ).turn
    second = {"id": "b", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    assert list(turn.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where\nis it"},
        {
            "role": "assistant",
            "content": WORDS,
            "reasoning_content": "Where?",
            "tool_calls": [dict(CALL.message()), second],
        },
        {"role": "tool", "tool_call_id": CALL.id, "content": "Suva"},
        {"role": "tool", "tool_call_id": "b", "content": "Fiji"},
        {"role": "assistant", "content": "Su"},
        {"role": "assistant", "content": "va"},
        {"role": "system", "content": "Go on"},
    ]
    assert list(turn.tools) == [{"type": "function", "function": TOOL}]


def test_a_reply_is_continued_by_its_id() -> None:
    """previous_response_id stands for all messages before it, but not for its instructions; items are found again."""

    async def test() -> None:
        ids = iter(("r1", "r2", "r3"))
        rollout = FakeRollout(
            lambda request: reply(id=next(ids), tool_calls=(CALL,), finish_reason="tool_calls")
        )
        async with served(rollout) as at:
            first = (await at.post("responses", HELLO | {"instructions": "Be brief."})).json()
            result = {"type": "function_call_output", "call_id": CALL.id, "output": "Suva"}
            follow = {"previous_response_id": first["id"], "input": [result]}
            second = (await at.post("responses", HELLO | follow)).json()
            third = [
                {"id": second["output"][0]["id"], "type": "item_reference"},
                {"role": "user", "content": "?"},
            ]
            await at.post("responses", HELLO | {"input": third})
        own = {"role": "assistant", "content": WORDS, "tool_calls": [dict(CALL.message())]}
        assert list(rollout.asked[1].messages) == [
            {"role": "user", "content": "Hello"},
            own,
            {"role": "tool", "tool_call_id": CALL.id, "content": "Suva"},
        ]
        assert list(rollout.asked[2].messages) == [
            {"role": "assistant", "content": WORDS},
            {"role": "user", "content": "?"},
        ]

    run(test())


def test_replies_that_are_not_kept() -> None:
    """404 for an id that was never given, and for one with store = false; the same for items."""

    async def test() -> None:
        async with served() as at:
            first = (await at.post("responses", HELLO | {"store": False})).json()
            for identity in (first["id"], "resp_none"):
                answer = await at.post("responses", HELLO | {"previous_response_id": identity})
                assert answer.status_code == 404
                assert answer.json()["error"]["code"] == "response_not_found"
            answer = await at.post(
                "responses", HELLO | {"input": [{"type": "item_reference", "id": "msg_r1"}]}
            )
            assert answer.json()["error"]["code"] == "item_not_found"
            assert len(at.rollout.asked) == 1

    run(test())


def test_a_history_that_is_sent_each_time_is_kept_once() -> None:
    """A hundred replies to a growing history cost its length, not the square of it; what does not fit is not kept."""
    kept, history = Kept(1000, 30_000), []
    for number in range(100):
        history = [*history, {"role": "user", "content": f"{number:0200}"}]
        answer = {"role": "assistant", "content": f"a{number}"}
        kept.keep(f"resp_{number}", None, [dict(m) for m in history], answer, [])
        assert kept.history(f"resp_{number}") == [*history, answer]
    kept.keep("large", None, [{"role": "user", "content": "x" * 30_000}], {"role": "assistant"}, [])
    kept.keep("small", None, [{"role": "user", "content": "y"}], {"role": "assistant"}, [])
    with pytest.raises(GatewayError, match="no response 'large' is kept"):
        kept.history("large")
    assert kept.history("small") and kept.history("resp_99")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": [{"text": "x"}]}, r"input\[0\]\.type is None, expected one of message, function_call"),
        ({"input": None}, "input is None, expected a text or a list of items"),
        ({"input": []}, "input is empty"),
        ({"input": [3]}, r"input\[0\] is 3"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            r"content\[0\]\.type is 'input_image'",
        ),
        ({"input": [{"type": "computer_call"}]}, r"input\[0\]\.type is 'computer_call'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, r"input\[0\]\.call_id is None"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": 3}]},
            r"input\[0\]\.output is 3",
        ),
        ({"input": [{"role": "tool", "content": ""}]}, r"input\[0\]\.role is 'tool'"),
        ({"input": output(reply())}, "input ends with the assistant's words"),
        ({"instructions": 3}, "instructions is 3"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"background": True}, "background is not supported"),
        ({"conversation": "c"}, "conversation is not supported"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]\.type is 'web_search'"),
        ({"metadata": 3}, "metadata is 3"),
        ({"store": "no"}, "store is 'no'"),
        ({"top_logprobs": 1}, "top_logprobs is not supported"),
    ],
)
def test_what_cannot_be_asked_is_named(changes: dict[str, Any], words: str) -> None:
    """400 with the field."""
    with pytest.raises(GatewayError, match=words) as refused:
        read(**changes)
    assert refused.value.status == 400


def test_settings_that_are_not_taken_are_told() -> None:
    """As those of Chat Completions, and the format of the text."""
    changes = {"temperature": 0.5, "text": {"format": {"type": "json_schema"}}, "tool_choice": "required"}
    assert read(**changes).overridden == ("temperature", "text.format", "tool_choice")
    assert (
        read(text={"format": {"type": "text"}, "verbosity": "low"}, top_p=1, truncation="auto").overridden
        == ()
    )


def test_a_reply_is_named_by_its_own_id() -> None:
    """The id follows from the turn's, so a program sees the same ids whenever it is played again."""
    assert response_id(reply(id="x")) == "resp_x" and [i["id"] for i in output(THOUGHT)] == [
        "rs_r1",
        "msg_r1",
        f"fc_{CALL.id}",
    ]
