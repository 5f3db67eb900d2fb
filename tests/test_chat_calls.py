"""Tool calls of atlas-chat in what a model wrote: strict, understood, or none; never an exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgrpo.tasks.atlas.chat_calls import MAX_VALUE, TOOLS, parse, render

ASK = {"relation": "capital", "entity": "Fiji"}


@pytest.mark.parametrize(
    "text",
    [
        render("ask", **ASK),
        '\n  {"name":"ask","arguments":{"entity":"Fiji","relation":"capital"}}  ',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": "Fij\\u0069"}}',
    ],
)
def test_strict_calls(text: str) -> None:
    """The object alone: white space, the order of keys and JSON's escapes do not matter."""
    call = parse("main", text)
    assert call is not None and call.strict and dict(call.arguments) == ASK


@pytest.mark.parametrize(
    "text",
    [
        "Sure! " + render("ask", **ASK),
        render("ask", **ASK) + " I hope this helps {really}.",
        "```json\n" + render("ask", **ASK) + "\n```",
        render("ask", **ASK) + render("answer", value="Suva"),
        "{name} " + render("ask", **ASK),
        "{} " + render("ask", **ASK),
        "{'name': 'ask', 'arguments': {'relation': 'capital', 'entity': 'Fiji'}}",
        '{"name": "ask", "arguments": {"relation": "capital", "entity": "Fiji"}',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": "Fiji"',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": "Fiji',
        '{"name": "ask", "parameters": {"relation": "capital", "entity": "Fiji"}}',
        '{"name": "ask", "relation": "capital", "entity": "Fiji"}',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": "Fiji", "year": 2020}}',
        '{"name": "ask", "id": 1, "arguments": {"relation": "capital", "entity": "Fiji"}}',
        '{"name": "ask", "arguments": {"relation": " capital ", "entity": "Fiji"}}',
    ],
)
def test_calls_that_are_understood_but_not_strict(text: str) -> None:
    """The intent is clear and is served; the format score is lost."""
    call = parse("main", text)
    assert call is not None and not call.strict
    assert call.name == "ask" and dict(call.arguments) == ASK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The capital of Fiji is Suva.",
        "{",
        "{" * 5000,
        '{"a":' * 3000,
        "[" * 3000,
        render("search", query="Fiji"),  # the other role's tool
        '{"name": "ask", "arguments": {"relation": "capital"}}',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": ""}}',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": null}}',
        '{"name": "ask", "arguments": {"relation": "capital", "entity": ["Fiji"]}}',
        '{"name": "ask", "arguments": {"relation": true, "entity": "Fiji"}}',
        '{"name": "ask", "arguments": "capital of Fiji"}',
        '{"name": ["ask"], "arguments": {}}',
        '{"arguments": {"relation": "capital", "entity": "Fiji"}}',
        '{"name": "answer", "arguments": {"value": "\\ud800"}}',
        '{"name": "answer", "arguments": {"value": "\\u0000\\n"}}',
    ],
)
def test_what_is_no_call(text: str) -> None:
    """Nothing to do: format 0, and never an exception."""
    assert parse("main", text) is None


def test_numbers_are_text() -> None:
    """A number where a name belongs is understood as its digits."""
    call = parse("sub", '{"name": "answer", "arguments": {"value": 679}}')
    assert call is not None and call.arguments["value"] == "679" and not call.strict
    assert parse("sub", f'{{"name": "answer", "arguments": {{"value": {"9" * 5000}}}}}') is None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["main", "sub"]),
    st.one_of(
        st.text(max_size=60),
        st.text("{}[]\":,'\\ naeswrumt0", max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["name", "arguments", "value", "query"]), inner, max_size=3)
            ),
        ).map(json.dumps),
    ),
)
def test_any_text_is_parsed_or_refused(role: str, text: str) -> None:
    """No output of a model raises; what is accepted can be shown to the others: UTF-8, printable, bounded."""
    call = parse(role, text)
    if call is not None:
        assert set(call.arguments) == set(TOOLS[role][call.name])
        for value in call.arguments.values():
            assert 0 < len(value) <= MAX_VALUE and value.isprintable() and value.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=MAX_VALUE))
def test_what_is_rendered_is_read_back(value: str) -> None:
    """Any printable value survives the way through JSON, quotes and backslashes included, and is strict."""
    value = "".join(c for c in value if c.isprintable()).strip() or "x"
    call = parse("sub", render("answer", value=value))
    assert call is not None and call.strict and call.arguments["value"] == value
