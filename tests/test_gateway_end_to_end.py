"""Programs over HTTP and the rollout behind it: what SDKs send back is the history that was said, in every dialect, and
what is trained is what was sampled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.gateway_kit import Team
from tests.gateway_server_kit import Served, run, served, until

CALL = '<tool_call>\n{"name": "find", "arguments": {"query": "Fiji", "most": 2}}\n</tool_call>'
TURNS = (
    f"<think>\nwhere is it\n</think>\n\nI look.{CALL}",
    f"<think>\nonce more\n</think>\n\n{CALL}{CALL.replace('Fiji', 'Tonga')}",
    "<think>\nso\n</think>\n\nSuva\n",
    " Yes, Suva. ",
)
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}, "most": {"type": "integer"}}}
FUNCTION = {"name": "find", "description": "Finds.", "parameters": PARAMETERS}


def script() -> Any:
    """The turns, one after the other, in each conversation."""
    return lambda text, seed: TURNS[text.count("<|im_start|>assistant") - 1]


async def chat(at: Served, stream: bool) -> None:
    """A program of OpenAI's SDK: what a stream says is put together as the SDK does it."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": [{"type": "text", "text": "Where is Suva?"}]},
    ]
    body = {"model": "main", "tools": [{"type": "function", "function": FUNCTION}], "messages": messages}
    for asked in range(len(TURNS)):
        if not stream:
            answer = await at.post("chat/completions", body)
            assert answer.status_code == 200, answer.text
            message = answer.json()["choices"][0]["message"]
        else:
            message = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
            for _, data in (await at.events("chat/completions", body))[:-1]:
                delta = data["choices"][0]["delta"]
                for key in ("content", "reasoning_content"):
                    message[key] += delta.get(key) or ""
                for part in delta.get("tool_calls", ()):
                    if "id" in part:
                        message["tool_calls"].append({key: part[key] for key in ("id", "type", "function")})
                    else:
                        message["tool_calls"][part["index"]]["function"]["arguments"] += part["function"][
                            "arguments"
                        ]
        messages.append(message)
        messages += [
            {"role": "tool", "tool_call_id": call["id"], "content": "the result"}
            for call in message.get("tool_calls") or ()
        ]
        if asked == 2:
            messages.append({"role": "user", "content": "Is it?"})


async def responses(at: Served, stream: bool, by_id: bool = False) -> None:
    """A program that keeps all items itself, or names the reply before."""
    items: list[dict[str, Any]] = [{"role": "user", "content": "Where is Suva?"}]
    body = {"model": "main", "instructions": "You answer.", "tools": [{"type": "function", **FUNCTION}]}
    previous = None
    for asked in range(len(TURNS)):
        asks = body | {"input": items, "previous_response_id": previous}
        if stream:
            answer = (await at.events("responses", asks))[-1][1]["response"]
        else:
            found = await at.post("responses", asks)
            assert found.status_code == 200, found.text
            answer = found.json()
        new = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "the result"}
            for item in answer["output"]
            if item["type"] == "function_call"
        ]
        if asked == 2:
            new.append({"role": "user", "content": "Is it?"})
        items = new if by_id else [*items, *answer["output"], *new]
        previous = answer["id"] if by_id else None


async def messages(at: Served, stream: bool) -> None:
    """A program of Anthropic's SDK."""
    said: list[dict[str, Any]] = [{"role": "user", "content": "Where is Suva?"}]
    tools = [{"name": "find", "description": "Finds.", "input_schema": PARAMETERS}]
    body = {"model": "main", "max_tokens": 500, "system": "You answer.", "tools": tools, "messages": said}
    for asked in range(len(TURNS)):
        if stream:
            blocks: list[dict[str, Any]] = []
            for _, data in await at.events("messages", body):
                if data["type"] == "content_block_start":
                    blocks.append(dict(data["content_block"]) | {"partial": ""})
                elif data["type"] == "content_block_delta":
                    delta, block = data["delta"], blocks[data["index"]]
                    key = {"input_json_delta": "partial_json"}.get(delta["type"], block["type"])
                    block["partial" if key == "partial_json" else key] += delta[key]
            for block in blocks:
                partial = block.pop("partial")
                if block["type"] == "tool_use":
                    block["input"] = json.loads(partial)
        else:
            answer = await at.post("messages", body)
            assert answer.status_code == 200, answer.text
            blocks = answer.json()["content"]
        said.append({"role": "assistant", "content": blocks})
        new: list[dict[str, Any]] = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "the result"}
            for block in blocks
            if block["type"] == "tool_use"
        ]
        if asked == 2:
            new.append({"type": "text", "text": "Is it?"})
        said.append({"role": "user", "content": new})


async def responses_by_id(at: Served, stream: bool) -> None:
    await responses(at, stream, by_id=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("program", [chat, responses, responses_by_id, messages])
def test_every_dialect_extends_the_history_that_was_said(program: Any, stream: bool) -> None:
    """Under the strictest policy: no turn is refused, rewritten or forked, and all dialects give the same tokens."""
    team = Team(script(), history="exact")

    async def test() -> None:
        async with served(team.rollout) as at:
            await program(at, stream)

    run(test())
    team.check()
    counts = team.rollout.counts
    assert counts["turns"] == len(TURNS) and not any(n for name, n in counts.items() if name != "turns")
    assert list(team.rollout.conversations()) == [("main", 0)]
    ids = team.trajectory().tokens.tolist()
    plain = Team(script(), history="exact")

    async def again() -> None:
        async with served(plain.rollout) as at:
            await chat(at, False)

    run(again())
    assert ids == plain.trajectory().tokens.tolist()


def test_a_retry_gets_what_was_sampled_for_the_peer_that_went_away() -> None:
    """One turn, sampled once: its conversation is as if the first answer had arrived."""
    team = Team(lambda text, seed: f"the {seed % 97} says so")
    engine = team.engines["main"]
    body = {"model": "main", "messages": [{"role": "user", "content": "Hello"}]}

    async def test() -> None:
        async with served(team.rollout) as at:
            engine.gate = asyncio.Event()
            first = asyncio.create_task(at.post("chat/completions", body))
            await until(lambda: engine.asked)
            first.cancel()
            await until(lambda: not at.server.server_state.tasks)
            waiting = asyncio.create_task(at.post("chat/completions", body, x_stainless_retry_count="1"))
            await until(lambda: team.rollout.counts["repeated"] == 1)
            engine.gate.set()
            answers = [(await waiting).json()]
            answers.append((await at.post("chat/completions", body, x_stainless_retry_count="2")).json())
            assert answers[0] == answers[1] and len(engine.asked) == 1
            message = answers[0]["choices"][0]["message"]
            follow = [*body["messages"], message, {"role": "user", "content": "and so?"}]
            assert (await at.post("chat/completions", body | {"messages": follow})).status_code == 200

    run(test())
    team.check()
    assert team.rollout.counts["turns"] == 2


def test_agents_speak_at_the_same_time() -> None:
    """Main and parallel twins of a sub-agent over as many connections: each has a conversation of its own."""
    team = Team(lambda text, seed: f"the {seed % 997} says so")

    async def test() -> None:
        async with served(team.rollout) as at:

            async def speak(role: str) -> list[str]:
                said: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
                for _ in range(3):
                    answer = await at.post("chat/completions", {"model": role, "messages": said})
                    assert answer.status_code == 200, answer.text
                    said += [answer.json()["choices"][0]["message"], {"role": "user", "content": "and?"}]
                return [str(m["content"]) for m in said if m["role"] == "assistant"]

            spoken = await asyncio.gather(speak("main"), *(speak("sub") for _ in range(5)))
            assert len({tuple(turns) for turns in spoken}) == 6

    run(test())
    team.check()
    places = {("main", 0), *(("sub", n) for n in range(5))}
    assert set(team.rollout.conversations()) == places


def test_what_is_over_is_refused_by_name() -> None:
    """A role that is not there, a turn that does not fit, a rollout that has ended."""
    team = Team(lambda text, seed: "so", max_length=300)

    async def test() -> None:
        async with served(team.rollout) as at:
            body = {"model": "other", "messages": [{"role": "user", "content": "the user " * 400}]}
            for path in ("chat/completions", "responses", "messages"):
                asks = body | {"input": body["messages"]}
                missing = await at.post(path, asks)
                assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
                long = await at.post(path, asks | {"model": "main"})
                assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
            team.rollout.end()
            over = await at.post("chat/completions", body | {"model": "main"})
            assert over.status_code == 409 and over.headers["x-should-retry"] == "false"

    run(test())
    assert not team.rollout.conversations()
