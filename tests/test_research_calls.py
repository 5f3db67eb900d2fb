"""Tool calls as text: what is strict, what is understood, what is neither, and what no turn can do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgrpo.tools.calls import MAX_CALLS, MAX_DEPTH, Call, parse, render
from mgrpo.tools.json_objects import objects

A = '{"name": "search", "arguments": {"query": "Fiji"}}'
B = '{"name": "visit", "arguments": {"url": "w/fiji"}}'
SEARCH = Call("search", {"query": "Fiji"})
VISIT = Call("visit", {"url": "w/fiji"})


def tagged(*texts: str) -> str:
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


@pytest.mark.parametrize(
    ("form", "text", "calls", "strict"),
    [
        ("hermes", tagged(A), [SEARCH], True),
        ("hermes", f"<tool_call>{A}</tool_call>", [SEARCH], True),
        ("hermes", "I look for it first.\n" + tagged(A, B), [SEARCH, VISIT], True),
        ("hermes", "<think>{not a call}</think>\n" + tagged(A), [SEARCH], True),
        ("hermes", "thoughts that the template began</think>" + tagged(A), [SEARCH], True),
        ("hermes", tagged('{"name": "search", "arguments": {"query": "</tool_call> <think>"}}'),
         [Call("search", {"query": "</tool_call> <think>"})], True),
        ("hermes", tagged('{"name": "search", "arguments": {"query": "a </think> b"}}'),
         [Call("search", {"query": "a </think> b"})], True),
        ("hermes", tagged(A) + " and then?", [SEARCH], False),
        ("hermes", tagged(A) + " so " + tagged(B), [SEARCH, VISIT], False),
        ("hermes", f"<tool_call>{A}", [SEARCH], False),
        ("hermes", f"<tool_call>{A}<tool_call>{B}</tool_call>", [SEARCH, VISIT], False),
        ("hermes", A, [SEARCH], False),
        ("hermes", f"```json\n{A}\n```", [SEARCH], False),
        ("hermes", tagged(f"```json\n{A}\n```"), [SEARCH], False),
        ("hermes", tagged("{'name': 'search', 'arguments': {'query': 'Fiji'}}"), [SEARCH], False),
        ("hermes", tagged('{"name": "search", "arguments": {"query": "Fiji"}'), [SEARCH], False),
        ("hermes", tagged('{"name": "search", "parameters": {"query": "Fiji"}}'), [SEARCH], False),
        ("hermes", tagged('{"name": "search", "arguments": "{\\"query\\": \\"Fiji\\"}"}'), [SEARCH], False),
        ("hermes", tagged('{"name": "search", "query": "Fiji"}'), [SEARCH], False),
        ("hermes", tagged('{"type": "function", "id": "1", "name": "search", "query": "Fiji"}'), [SEARCH], False),
        ("hermes", tagged('{"function": {"name": "search", "arguments": {"query": "Fiji"}}}'), [SEARCH], False),
        ("hermes", tagged('{"name": " search", "arguments": {"query": "Fiji"}}'), [SEARCH], False),
        ("json", A, [SEARCH], True),
        ("json", f"{A}\n{B}", [SEARCH, VISIT], True),
        ("json", f"<think>hm</think>\n\n{A}", [SEARCH], True),
        ("json", f"I will: {A}", [SEARCH], False),
        ("json", f"{A} {B}.", [SEARCH, VISIT], False),
        ("json", f"[{A}, {B}]", [SEARCH, VISIT], False),
        ("json", tagged(A), [SEARCH], False),
        ("json", '{"name": "search", "arguments": {"query": "Fiji"', [SEARCH], False),
        ("json", '{"query": "no name"} ' + A, [SEARCH], False),
    ],
)  # fmt: skip
def test_what_is_understood(form: Any, text: str, calls: list[Call], strict: bool) -> None:
    """Each way of writing calls gives these calls, and only the one that was asked for is strict."""
    turn = parse(form, text)
    assert (list(turn.calls), turn.strict) == (calls, strict)


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("hermes", "The answer is Suva.", "no tool call was found in your turn; expected <tool_call>"),
        ("json", "", "no tool call was found in your turn; expected {"),
        ("json", "{}", "no tool call"),
        ("hermes", "<think>" + tagged(A), "your thoughts did not end"),
        ("hermes", tagged("search(Fiji)"), "a tool call could not be read: search(Fiji)"),
        ("hermes", "<tool_call>", "could not be read"),
        ("json", '{"name": "search", "arguments": {"query": NaN}}', "arguments of search cannot be taken"),
        ("json", '{"name": "search", "arguments": {"query": 1e999}}', "arguments of search cannot be taken"),
        ("json", f'{{"name": "search", "arguments": {{"n": {2**64}}}}}', "arguments of search cannot be taken"),
        ("json", '{"name": "search", "arguments": {"n": ' + "[" * 20 + "]" * 20 + "}}", f"than {MAX_DEPTH} levels"),
    ],
)  # fmt: skip
def test_what_is_not_understood(form: Any, text: str, words: str) -> None:
    """Such a turn is one call that says what is wrong."""
    turn = parse(form, text)
    assert not turn.strict and len(turn.calls) == 1 and words in turn.calls[0].problem


def test_one_bad_block_among_good_ones() -> None:
    """The good calls are made; the bad one has its place among them."""
    turn = parse("hermes", tagged(A, "oh", B))
    assert turn.calls[0] == SEARCH and turn.calls[2] == VISIT and not turn.strict
    assert "could not be read: oh" in turn.calls[1].problem


def test_more_calls_than_are_read() -> None:
    """A turn of many calls is cut and not strict."""
    for form in ("hermes", "json"):
        turn = parse(form, render(form, *[("search", {"query": "x"})] * 40))  # type: ignore[arg-type]
        assert len(turn.calls) == MAX_CALLS and not turn.strict


def test_texts_that_cannot_be_encoded() -> None:
    """Half a surrogate pair and NUL, which JSON can spell, become what a tokenizer and a service take."""
    turn = parse("json", r'{"name": "search", "arguments": {"query": "a\ud800b\u0000c"}}')
    assert turn.calls[0].arguments == {"query": "a?bc"}


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(
    st.sampled_from(["hermes", "json"]),
    st.lists(st.tuples(st.from_regex(r"[a-z_]{1,20}", fullmatch=True), st.dictionaries(st.text("xyz", min_size=1),
             VALUES, max_size=3)), min_size=1, max_size=4),
)  # fmt: skip
def test_what_is_rendered_is_strict(form: Any, calls: list[tuple[str, dict[str, object]]]) -> None:
    """Whatever the arguments say, tags and braces included, a turn as it should be is read back, and is strict."""
    turn = parse(form, render(form, *calls))
    assert turn.strict and [(c.name, c.arguments) for c in turn.calls] == calls


@given(
    st.sampled_from(["hermes", "json"]),
    st.text(alphabet="{}[]\"':,\\ntue<>/_calog 1.e`\ud800\0", max_size=60),
)
def test_any_turn_is_read(form: Any, text: str) -> None:
    """No turn raises; each has a call, and arguments are JSON."""
    turn = parse(form, text)
    assert turn.calls and all(call.name or call.problem for call in turn.calls)
    for call in turn.calls:
        json.dumps(dict(call.arguments), allow_nan=False).encode()


def test_objects_and_their_places() -> None:
    """Objects stand where they are said to; a mended one ends behind the text."""
    text = f"say {A} and {{'x': 1}}"
    (found,) = objects(text)  # only the first candidate is mended
    assert text[found.start : found.end] == A
    (mended,) = objects("so {'x': [1, 2]")
    assert mended.value == {"x": [1, 2]} and mended.end > len("so {'x': [1, 2]")
