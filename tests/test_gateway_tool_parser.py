"""A sampled turn in its parts: thoughts, words, tool calls, by text and by the parsers of a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.environments.episode import Agent
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.tool_parser import HermesParser, Parsed, ParsedCall, ServerParser, open_parser
from mgrpo.tools.calls import MAX_CALLS, render
from tests.fake_sglang import FakeSglang
from tests.fake_vllm import FakeVllm
from tests.models import tiny_tokenizer
from tests.server_bench import Bench, on_fakes, on_servers, weights
from tests.test_chat import CHATML, FORGETFUL
from tests.test_chat import tokenizer as chat_tokenizer

FIND: Mapping[str, object] = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object"}},
}
CALL = render("hermes", ("find", {"query": "Fiji"}))
FOUND = (ParsedCall("find", '{"query": "Fiji"}'),)
END = 9  # the id that ends a turn of the fake server's policy
WORDS = tiny_tokenizer()


def hermes(
    text: str,
    tools: Sequence[Mapping[str, object]] = (FIND,),
    finish: Literal["stop", "length"] = "stop",
    **how: bool,
) -> Parsed:
    return asyncio.run(HermesParser(**how).parse([], text, tools, finish=finish))


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (" Suva.\n", " Suva.\n", "", ()),
        (CALL, "", "", FOUND),
        (f"I look.\n{CALL}\n", "I look.", "", FOUND),
        (f"{CALL}\n{CALL}", "", "", FOUND * 2),
        (f"<think>\nhm\n</think>\n\nI look. {CALL}", "I look.", "hm", FOUND),
        ("<think>\n\n</think>\n\nSuva.", "Suva.", "", ()),
        ("hm</think>Suva.", "Suva.", "hm", ()),  # the template has written <think>
        (f"{CALL} or </think>?", "or </think>?", "", FOUND),
        ('{"a": "</think>"}', '{"a": "</think>"}', "", ()),
        ("<think> without an end", "", "without an end", ()),
        (f"<think>{CALL}</think>no", "no", CALL, ()),  # what is only thought is not done
        ("<tool_call>{'name': 'find', 'arguments': {'query': 'Fiji'}}</tool_call>", "", "", FOUND),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", "", ()),
        (f"<tool_call>[1]</tool_call>{CALL}", "<tool_call>[1]</tool_call>", "", FOUND),
        ('{"name": "find", "arguments": {}}', '{"name": "find", "arguments": {}}', "", ()),  # no tags, no call
        ('<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>', "", "",
         (ParsedCall("f", '{"x": "</tool_call>"}'),)),
    ],
)  # fmt: skip
def test_a_turn_in_its_parts(text: str, content: str, reasoning: str, calls: tuple[ParsedCall, ...]) -> None:
    """Thoughts, words and calls apart; what is not understood stays content as it stands."""
    assert hermes(text) == Parsed(content, reasoning, calls, "tool_calls" if calls else "stop")


def test_nothing_is_a_call_where_no_tools_were_given() -> None:
    """A program that offered no tools gets the text."""
    assert hermes(CALL, tools=()) == Parsed(CALL, "", (), "stop")


def test_a_call_that_was_cut_off_is_not_made() -> None:
    """At the bound of a turn an argument may be half of what it would have been; calls before it stand."""
    half = '<tool_call>{"name": "find", "arguments": {"query": "Fi'
    mended = hermes(half)
    assert mended.calls and mended.finish_reason == "tool_calls"  # it ended of its own accord
    assert hermes(half, finish="length") == Parsed(half, "", (), "length")
    assert hermes(f"{CALL}\n{half}", finish="length") == Parsed(half, "", FOUND, "tool_calls")


def test_thoughts_that_the_template_began_may_be_cut_off() -> None:
    """Such a turn is within thoughts from its first token, also where it begins as an answer would."""
    assert hermes("{hm", thinks=True, finish="length") == Parsed("", "{hm", (), "length")
    assert hermes("{hm</think> Suva", thinks=True) == Parsed("Suva", "{hm", (), "stop")
    assert hermes("{hm") == Parsed("{hm", "", (), "stop")


def test_too_many_calls_are_words() -> None:
    """Those beyond the bound stay content."""
    found = hermes("\n".join([CALL] * (MAX_CALLS + 3)))
    assert len(found.calls) == MAX_CALLS and found.content.count("<tool_call>") == 3


@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "{", '"', "}", "\n", "</think>", "<think>", CALL, "x"]
        )
    )
)
def test_no_turn_breaks_it_and_arguments_are_json(parts: list[str]) -> None:
    """Whatever is sampled: arguments are the JSON text of an object, and without calls and thoughts nothing is lost."""
    text = "".join(parts)
    found = hermes(text)
    assert all(isinstance(json.loads(call.arguments), dict) for call in found.calls)
    if not found.calls and "think>" not in text:
        assert found.content == text


def test_the_parser_of_an_agent() -> None:
    """The chat template says whether turns begin within thoughts; an engine without a server has no parser of one."""

    def agent(template: str) -> Agent:
        tokenizer = chat_tokenizer(template)
        return Agent("main", ScriptedEngine(lambda text: "", tokenizer), tokenizer, 1.0, 64)

    def said(template: str) -> Parsed:
        return asyncio.run(open_parser("hermes", agent(template)).parse([], "hm", (), finish="stop"))

    assert said(CHATML) == Parsed("hm", "", (), "stop")
    assert said(FORGETFUL) == Parsed("", "hm", (), "stop")
    with pytest.raises(ConfigError, match=r'tool_parser="server": the engine of role .main. has no server'):
        open_parser("server", agent(CHATML))


# -- a server's parsers --


async def loaded(bench: Bench[Any], **settings: Any) -> ServerParser:
    """Of an engine whose servers are ready, with the prompt's tail [1, 2]."""
    engine = bench.engine(**settings)
    await engine.load(weights(1), 1)
    return ServerParser(engine, WORDS, {END}, [1, 2])


def test_a_servers_parser_is_asked_for_the_parts(tmp_path: Path) -> None:
    """The ids go there without the token that ended the turn, with the tools and the prompt's tail; the calls decide
    the finish reason. That the server has a parser is asked once."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        parser = await loaded(bench)
        found = await parser.parse([3, 7, 4, 5, END], "w3 w7 w4 w5", [FIND], finish="stop")
        assert found == Parsed("w3", "", (ParsedCall("find", '{"query": "w4 w5"}'),), "tool_calls")
        asked, sent = server.derendered
        assert "chat_request" not in asked and sent["prompt_token_ids"] == [1, 2]
        assert sent["generate_response"] == {
            "choices": [{"index": 0, "token_ids": [3, 7, 4, 5]}],
            "prompt_token_ids": [1, 2],
        }
        assert sent["chat_request"]["tools"] == [FIND] and sent["chat_request"]["tool_choice"] == "auto"
        assert await parser.parse([3, 4], "w3 w4", [], finish="length") == Parsed("w3 w4", "", (), "length")
        assert len(server.derendered) == 3 and "tools" not in server.derendered[-1]["chat_request"]
        assert await parser.parse([END], "", [FIND], finish="stop") == Parsed("", "", (), "stop")
        assert len(server.derendered) == 3  # nothing was said

    on_servers(1, test, tmp_path)


def test_a_stop_text_is_no_content(tmp_path: Path) -> None:
    """The server sees all ids; what the turn's text has lost at its end leaves the content, too."""

    async def test(bench: Bench[FakeVllm]) -> None:
        parser = await loaded(bench)
        found = await parser.parse([3, 4, 5], "w3 ", [FIND], finish="stop")
        assert found == Parsed("w3 ", "", (), "stop")

    on_servers(1, test, tmp_path)


def test_what_a_server_refuses_is_named(tmp_path: Path) -> None:
    """A program's malformed tools are its own mistake; a server without a parser or without the route is the run's."""

    async def test(bench: Bench[FakeVllm]) -> None:
        (server,) = bench.servers
        parser = await loaded(bench)
        with pytest.raises(GatewayError, match="field required: function") as refused:
            await parser.parse([3], "w3", [{"type": "function"}], finish="stop")
        assert refused.value.status == 400
        for status, hint in ((403, "--enable-scale-out"), (404, r"0\.32 or newer")):
            server.refuse["/v1/chat/completions/derender"] = (status, "no")
            with pytest.raises(ConfigError, match=hint):
                await parser.parse([3], "w3", [FIND], finish="stop")
        server.refuse["/v1/chat/completions/derender"] = (500, "a parser that failed")
        with pytest.raises(InfrastructureError, match="a parser that failed"):
            await parser.parse([3], "w3", [FIND], finish="stop")

    on_servers(1, test, tmp_path)

    async def plain(bench: Bench[FakeVllm]) -> None:
        bench.servers[0].parser = False
        parser = await loaded(bench)
        with pytest.raises(
            ConfigError, match="parses no tool calls; start it with --enable-auto-tool-choice"
        ):
            await parser.parse([3, 7, 4], "w3 w7 w4", [FIND], finish="stop")

    on_servers(1, plain, tmp_path)


def test_another_server_answers_for_one_that_died(tmp_path: Path) -> None:
    """Parsers need no weights, so any ready server will do; without one it is an infrastructure failure, in time."""

    async def test(bench: Bench[FakeVllm]) -> None:
        parser = await loaded(bench, watch=30.0, timeout=0.5)
        for server in bench.servers:
            assert (await parser.parse([3, END], "w3", [FIND], finish="stop")).content == "w3"
            await server.stop()
        with pytest.raises(InfrastructureError, match=r"s0.*s1"):
            await parser.parse([3], "w3", [FIND], finish="stop")
        for server in bench.servers:
            await server.start()

    on_servers(2, test, tmp_path)


def test_sglang_has_none(tmp_path: Path) -> None:
    """Its engine says so before anything is sampled."""

    async def test(bench: Bench[FakeSglang]) -> None:
        engine = bench.engine()
        assert not engine.parses_turns
        agent = Agent("main", engine, chat_tokenizer(CHATML), 1.0, 64)
        with pytest.raises(ConfigError, match="has no server that parses tool calls"):
            open_parser("server", agent)
        await engine.load(weights(1), 1)
        with pytest.raises(ConfigError, match="SGLang has no route that parses"):
            await engine.parse_turn([1], [])

    on_fakes(FakeSglang, 1, test, tmp_path)
