"""Whose history a request goes on with: normal forms, exact extensions, rewritten histories, twins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from mgrpo.gateway.history import (
    Entry,
    Past,
    accepted,
    canonical,
    choose_extended,
    choose_rewritten,
    difference,
    digest,
    entry,
    extended,
    repeats,
    rewritten,
)
from tests.gateway_kit import assistant, result, system, user


def call(name: str, arguments: Any, number: str = "c1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def entries(*messages: dict[str, Any]) -> list[Entry]:
    return [entry(message) for message in messages]


def past(*messages: dict[str, Any], first: int = 2) -> Past:
    return Past(entries(*messages), first)


SAID = Entry("assistant", "Suva", reasoning="an island", raw="<think>an island</think>\n\nSuva")
FIRST = [system("Be brief."), user("capital of Fiji")]


def spoken(*replies: Entry) -> Past:
    """The first messages, then a reply, a question, a reply ..."""
    found = entries(*FIRST)
    for number, reply in enumerate(replies):
        found += [entry(user(f"go on {number}"))] if number else []
        found.append(reply)
    return Past(found, 2)


# -- normal form --


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (assistant("", tool_calls=[]), {"role": "assistant", "content": None}),
        (user("ab"), {"role": "user", "content": [{"type": "text", "text": "ab"}]}),
        (assistant("ab"), {"role": "assistant", "content": [{"type": "text", "text": t} for t in "ab"]}),
        ({"role": "developer", "content": "x"}, system("x")),
        (
            assistant("", tool_calls=[call("f", '{"a": 1, "b": [2.0]}')]),
            assistant("", tool_calls=[call("f", '{"b":[2],"a":1.0}', "other")]),
        ),
        (
            assistant("", tool_calls=[call("f", {"a": "é"})]),
            assistant("", tool_calls=[call("f", '{"a":"\\u00e9"}')]),
        ),
        (assistant("", tool_calls=[call("f", "")]), assistant("", tool_calls=[call("f", {})])),
        (result("c1", "Suva"), result("c2", "Suva")),
        ({**assistant("x"), "name": "main"}, assistant("x")),
    ],
)
def test_one_message_in_two_forms_is_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """What a content is wrapped in, how JSON is written and what ids calls have makes no difference."""
    assert entry(one) == entry(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (user("a"), user("a ")),
        (user("a"), user("A")),
        (user("a"), system("a")),
        (user("a"), {**user("a"), "name": "bob"}),
        (
            assistant("", tool_calls=[call("f", '{"a": 1}')]),
            assistant("", tool_calls=[call("f", '{"a": "1"}')]),
        ),
        (
            assistant("", tool_calls=[call("f", '{"a": true}')]),
            assistant("", tool_calls=[call("f", '{"a": 1}')]),
        ),
        (assistant("", tool_calls=[call("f", "{}")]), assistant("", tool_calls=[call("g", "{}")])),
        (assistant("", tool_calls=[call("f", "{}")]), assistant("")),
        (assistant("", tool_calls=[call("f", "{}")] * 2), assistant("", tool_calls=[call("f", "{}")])),
        (assistant("", tool_calls=[call("f", "{a")]), assistant("", tool_calls=[call("f", "{b")])),
    ],
)
def test_messages_that_differ_are_not_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """White space, types in arguments, names, and calls count."""
    assert entry(one) != entry(other)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "x"}, "role of a message is None"),
        ({"role": 3, "content": "x"}, "role of a message is 3"),
        ({"role": "user", "content": 3}, "of type int"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            "'image_url', expected text",
        ),
        ({"role": "user", "content": [7]}, "'int', expected text"),
        (assistant("", tool_calls=["f"]), "a tool call is 'f'"),
        (assistant("", tool_calls=[{"id": "1"}]), "a tool call is"),
        (assistant("", tool_calls=[call("", "{}")]), "name of a tool call is ''"),
    ],
)
def test_what_is_no_message_is_refused(message: dict[str, Any], reason: str) -> None:
    """The error names what stands there."""
    with pytest.raises(ValueError, match=reason):
        entry(message)


def test_hostile_arguments_are_text() -> None:
    """JSON that is too deep, too large a number, or none at all does not fail the comparison."""
    for text in ("[" * 100_000, "1" * 10_000, '{"a": ', "\ud800"):
        assert canonical(text) == json.dumps(text, ensure_ascii=False)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        canonical(deep)


# -- exact extensions --


def test_an_extension_begins_with_all_that_was_said() -> None:
    """New messages are those behind it; nothing new, a changed or a missing message is no extension."""
    said = spoken(SAID)
    now = entries(*FIRST, assistant("Suva", reasoning_content="an island"), user("and Tonga?"), user("quick"))
    match = extended(said, now)
    assert match is not None
    assert (match.new, match.exact, match.thoughts) == (3, True, False)
    assert extended(said, now[:3]) is None
    assert extended(said, [now[0], *now[2:]]) is None
    assert extended(said, [*now[:2], entry(assistant("Suva ")), *now[3:]]) is None
    assert extended(said, [*now, entry(assistant("foreign")), entry(user("x"))]) is None


@pytest.mark.parametrize(
    ("reply", "thoughts"),
    [
        (assistant("Suva"), True),
        (assistant("Suva", reasoning_content="an island"), False),
        (assistant("Suva", reasoning="an island"), False),
        (assistant("<think>an island</think>\n\nSuva"), False),
        (assistant("Suva", reasoning_content="another"), None),
        (assistant("<think>an island</think>Suva"), None),
    ],
)
def test_thoughts_may_be_kept_or_left_out_but_not_changed(
    reply: dict[str, Any], thoughts: bool | None
) -> None:
    """Apart, within the text as it was sampled, or gone, which is noticed; None: another history."""
    match = extended(spoken(SAID), entries(*FIRST, reply, user("x")))
    assert (match and match.thoughts) is thoughts


def test_ids_tell_twins_apart_that_said_the_same() -> None:
    """Two conversations with equal texts: the one whose call ids the request has, else the first."""

    def said(number: str) -> Past:
        return Past([*entries(*FIRST), entry(assistant("", tool_calls=[call("f", "{}", number)]))], 2)

    twins = [said("c1"), said("c2")]
    for number, which in (("c1", 0), ("c2", 1), ("c3", 0)):
        now = entries(*FIRST, assistant("", tool_calls=[call("f", "{}", number)]), result(number, "x"))
        found = choose_extended(twins, now)
        assert found is not None
        assert found[0] == which


def test_a_twin_with_its_thoughts_wins() -> None:
    """Without thoughts both match; with them, only the one who had them."""
    other = Entry("assistant", "Suva", reasoning="by the sea", raw="...")
    twins = [spoken(SAID), spoken(other)]
    found = choose_extended(
        twins, entries(*FIRST, assistant("Suva", reasoning_content="by the sea"), user("x"))
    )
    assert found is not None
    assert found[0] == 1
    quiet = Entry("assistant", "Suva", raw="Suva")
    found = choose_extended([spoken(SAID), spoken(quiet)], entries(*FIRST, assistant("Suva"), user("x")))
    assert found is not None
    assert found[0] == 1
    assert not found[1].thoughts


# -- rewritten histories --

A, B = Entry("assistant", "one", raw="one"), Entry("assistant", "two", raw="two")


@pytest.mark.parametrize(
    ("now", "placed"),
    [
        ([*FIRST, assistant("ONE"), user("go on 0"), assistant("TWO"), user("x")], True),
        ([*FIRST, assistant("ONE"), assistant("TWO"), user("x")], True),
        ([*FIRST, assistant("ONE"), user("x")], False),
        ([*FIRST, assistant("one"), user("another branch")], False),
        ([system("Be kind."), user("summary"), user("go on 1"), assistant("two"), user("x")], True),
        ([system("Be kind."), user("summary"), user("other"), assistant("two"), user("x")], None),
        ([*FIRST, user("your answer was invalid")], None),
        ([system("Be brief."), user("capital of Tonga"), assistant("ONE"), user("x")], None),
        ([system("Be brief."), user("summary")], None),
    ],
)
def test_who_a_rewritten_history_belongs_to(now: list[dict[str, Any]], placed: bool | None) -> None:
    """The same first messages with replies behind them, or the same end; anything else is another conversation's."""
    match = rewritten(past(*FIRST, *_turns()), entries(*now), sole=False)
    assert (match and match.placed) is placed
    if match is not None:
        assert now[match.new - 1]["role"] == "assistant"
        assert all(m["role"] != "assistant" for m in now[match.new :])


def _turns() -> Sequence[dict[str, Any]]:
    return assistant("one"), user("go on 1"), assistant("two")


def test_of_main_every_history_is() -> None:
    """Main has one conversation; a place it has only where there are as many replies, or the same end."""
    said = past(*FIRST, *_turns())
    for now, placed in (
        ([system("summary")], False),
        (
            [system("today is Monday"), user("x"), assistant("ONE"), user("y"), assistant("TWO"), user("z")],
            True,
        ),
        ([system("summary"), assistant("ONE"), user("z")], False),
    ):
        match = rewritten(said, entries(*now), sole=True)
        assert match is not None
        assert match.placed is placed


def test_examples_in_the_first_messages_are_no_replies() -> None:
    """Two invocations that share their examples are two, even where one has answered as the example does."""
    shots = [system("Be brief."), user("capital of Tonga"), assistant("Nuku'alofa")]
    said = past(*shots, user("capital of Fiji"), assistant("Nuku'alofa"), first=4)
    assert rewritten(said, entries(*shots, user("capital of Samoa")), sole=False) is None
    now = entries(*shots, user("capital of Fiji"), assistant("nowhere"), user("sure?"))
    match = rewritten(said, now, sole=False)
    assert match is not None
    assert (match.new, match.placed) == (5, True)
    kept = accepted(said, now, match)
    assert (kept.first, kept.entries) == (4, now)


def test_the_likeliest_of_several_is_taken() -> None:
    """What the program read between the replies tells twins apart when the replies were rewritten."""
    twins = [past(*FIRST, assistant("one"), user(word), assistant(f"so {word}")) for word in ("red", "blue")]
    now = entries(*FIRST, assistant("Calling: one"), user("blue"), assistant("Calling: so blue"), user("x"))
    found = choose_rewritten(twins, now, sole=False)
    assert found is not None
    assert found[0] == 1
    now = entries(*FIRST, assistant("Calling: one"), user("?"), assistant("Calling: so blue"), user("x"))
    found = choose_rewritten(twins, now, sole=False)
    assert found is not None
    assert found[0] == 1


def test_what_a_program_made_of_a_history_is_what_it_is_held_to() -> None:
    """Once accepted, a rewritten reply or one without thoughts is no news; a sampled one keeps its sampled form."""
    said = spoken(SAID, A)
    now = entries(*FIRST, assistant("Suva"), user("go on 1"), assistant("ONE"), user("x"))
    match = rewritten(said, now, sole=True)
    assert match is not None
    held = accepted(said, now, match)
    assert repeats(held, now)
    assert held.entries[2].reasoning == ""
    again = extended(Past([*held.entries, B], 2), [*now, B, entry(user("y"))])
    assert again is not None
    assert not again.thoughts
    exact = entries(*FIRST, assistant("Suva", reasoning_content="an island"), user("x"))
    match = extended(spoken(SAID), exact)
    assert match is not None
    assert accepted(spoken(SAID), exact, match).entries[2] is SAID


def test_a_first_message_that_changed_moves_where_replies_begin() -> None:
    """Of main, kept by place: its first messages are those before its first reply, as the program has them now."""
    said = past(*FIRST, assistant("one"))
    now = entries(system("Step 2"), user("capital"), user("of Fiji"), assistant("one"), user("x"))
    match = rewritten(said, now, sole=True)
    assert match is not None
    assert match.placed
    assert accepted(said, now, match).first == 3


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ([*FIRST, assistant("ONE"), user("x")], "message 2 is assistant: 'ONE', not assistant: 'one'"),
        (FIRST, "ends before message 2, of 5"),
        (
            [*FIRST, *_turns(), user("x"), assistant("y"), user("z")],
            "message 6 is the assistant's, and was not",
        ),
        ([*FIRST, assistant("one", tool_calls=[call("f", "{}")]), user("x")], "message 2 has the calls"),
        ([*FIRST, assistant("one", reasoning_content="hm"), user("x")], "message 2 has other thoughts"),
    ],
)
def test_a_difference_is_named(now: list[dict[str, Any]], words: str) -> None:
    """The first message that is not what was said."""
    assert words in difference(past(*FIRST, *_turns()), entries(*now))


def test_digests_follow_from_what_is_said() -> None:
    """Equal for equal first messages whatever their ids; different for another role, tools, border or order."""
    shots = [*FIRST, assistant("", tool_calls=[call("f", "{}", "c1")]), result("c1", "x")]
    same = [*FIRST, assistant("", tool_calls=[call("f", "{ }", "c9")]), result("c9", "x")]
    none: frozenset[str] = frozenset()
    assert digest("sub", entries(*shots), none) == digest("sub", entries(*same), none)
    seen = {
        digest("sub", entries(*FIRST), none),
        digest("main", entries(*FIRST), none),
        digest("sub", entries(*FIRST), frozenset(["x"])),
        digest("sub", entries(*FIRST[::-1]), none),
        digest("sub", entries(system("Be brief.capital"), user(" of Fiji")), none),
        digest("sub", entries(user("\ud800")), none),
    }
    assert len(seen) == 6
