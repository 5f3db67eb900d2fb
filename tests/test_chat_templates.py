"""Every family's chat template: held turn by turn, a conversation has the ids of the whole one rendered at once, or it
is refused by name before it begins. What is refused stands in docs/models.md, which this file keeps true."""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgrpo.errors import ChatError, ConfigError
from mgrpo.model.chat import ChatFormat
from mgrpo.model.chat_check import ChatUse, check_chat
from tests.chat_templates import FAMILIES, Family

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a fact.",
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
        },
    }
]
CALL = {
    "type": "function",
    "id": "call12345",
    "function": {"name": "look_up", "arguments": {"of": "Fiji"}},
}
SYSTEM, USER = {"role": "system", "content": "You answer."}, {"role": "user", "content": "capital of Fiji"}
RESULT = {"role": "tool", "content": "the result is Suva", "name": "look_up", "tool_call_id": "call12345"}
NEXT = {"role": "user", "content": "and of Samoa?"}

Talk = tuple[list[dict[str, Any]], list[tuple[dict[str, Any] | str, list[dict[str, Any]]]], bool]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TALKS: dict[
    str, Talk
] = {  # first messages, then (the turn, what follows it) each, and whether tools are given
    "users": ([USER], [("Suva", [NEXT]), ("Apia", [NEXT]), ("the capital", [NEXT])], False),
    "system": ([SYSTEM, USER], [("Suva", [NEXT]), ("Apia", [NEXT])], False),
    "examples": ([SYSTEM, USER, {"role": "assistant", "content": "Suva"}, NEXT], [("Apia", [NEXT])], False),
    "tools, users": ([USER], [("Suva", [NEXT]), ("Apia", [NEXT])], True),
    "tool results": ([USER], [("look up", [RESULT]), ("again", [RESULT]), ("Suva", [NEXT])], True),
    "calls": ([USER], [(CALLED, [RESULT]), (CALLED, [RESULT])], True),
    "calls, user": ([USER], [(CALLED, [RESULT]), ("Suva", [NEXT])], True),
    "parallel results": ([SYSTEM, USER], [("look up", [RESULT, RESULT])], True),
}


def encode(tok: Any, text: str) -> list[int]:
    return [int(i) for i in tok.encode(text, add_special_tokens=False)]


def render(tok: Any, messages: list[dict[str, Any]], tools: list[Any] | None, **options: Any) -> str:
    text: str = tok.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    return text


def sampled(
    family: Family, tok: Any, messages: list[dict[str, Any]], turn: Any, tools: Any, role: str
) -> str:
    """What the policy says: its words, or the call as the template writes it behind the generation prompt."""
    if isinstance(turn, str):
        return family.turn(turn, role)
    before = render(tok, messages, tools, add_generation_prompt=True)
    after = render(tok, [*messages, turn, RESULT], tools, add_generation_prompt=True)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    said = after[same:]
    ends = [said.find(stop) + len(stop) for stop in family.stops if stop in said]
    return said[: min(ends)]


def hold(family: Family, talk: Talk) -> tuple[list[int], list[int]]:
    """(ids turn by turn, ids of the whole conversation at once)."""
    first, turns, with_tools = talk
    tok, tools = family.tokenizer(), TOOLS if with_tools else None
    form = ChatFormat(tok)
    called = any(isinstance(turn, dict) for turn, _ in turns)
    opening = form.open(first, tools, calls=called)
    ids, messages = list(opening.ids), list(first)
    for turn, new in turns:
        said = encode(tok, sampled(family, tok, messages, turn, tools, new[0]["role"]))
        follows = form.extend(
            new, last=said[-1], calls=turn["tool_calls"] if isinstance(turn, dict) else None, opening=opening
        )
        if family.written and isinstance(turn, str):
            said[-1] = tok.convert_tokens_to_ids(family.written)
        ids += [*said, *follows]
        messages += [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn, *new]
    return ids, encode(tok, render(tok, messages, tools, add_generation_prompt=True))


REFUSED = {
    "Gemma 2": {"system", "examples", "tools, users", "tool results", "calls", "calls, user", "parallel results"},
    "Gemma 3": {"tools, users", "tool results", "calls", "calls, user", "parallel results"},
    "Phi-3": {"tools, users", "tool results", "calls", "calls, user", "parallel results"},
    "Mistral 7B v0.3": {
        "system", "examples", "tools, users", "tool results", "calls, user", "parallel results",
    },
    "DeepSeek-V3": {"tools, users", "tool results", "calls", "calls, user", "parallel results"},
    "DeepSeek-R1": {"tools, users", "tool results", "calls", "calls, user", "parallel results"},
    "gpt-oss": {"tools, users", "tool results", "parallel results"},
}  # fmt: skip
# The template refuses the whole conversation, not what is appended to it: see test_any_call_is_the_call.
UNWRITTEN = {("MiniMax-M2", "tool results"), ("MiniMax-M2", "parallel results")}


PAIRS = [(family, talk) for family in FAMILIES for talk in TALKS if (family.name, talk) not in UNWRITTEN]


@pytest.mark.parametrize(("family", "talk"), PAIRS, ids=[f"{family.name}-{talk}" for family, talk in PAIRS])
def test_turn_by_turn_equals_the_whole_at_once(family: Family, talk: str) -> None:
    """Up to the stop that was sampled, which some templates write as another token; or it is refused by name."""
    if talk in REFUSED.get(family.name, ()):
        with pytest.raises(ChatError, match="the chat template of"):
            hold(family, TALKS[talk])
        return
    ids, whole = hold(family, TALKS[talk])
    tok = family.tokenizer()
    if family.dropped:  # what was sampled behind an opening of thoughts keeps it
        ids, whole = (encode(tok, tok.decode(i).replace(family.dropped, "")) for i in (ids, whole))
    assert tok.decode(ids) == tok.decode(whole)
    assert ids == whole


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_any_call_is_the_call(family: Family) -> None:
    """Where a result can be written without the call that it answers, it is written as with it."""
    form = ChatFormat(family.tokenizer())
    try:
        opening = form.open([USER], TOOLS)
    except ChatError:
        return
    without = form.extend([RESULT], opening=opening)
    assert without == form.extend([RESULT], calls=[CALL], opening=opening)
    assert "the result is Suva" in form.tokenizer.decode(without)


FORMS: dict[str, ChatFormat] = {}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nobody_but_the_template_writes_control_tokens(family: Family, data: st.DataObject) -> None:
    """Whatever a message spells, whole or in parts that join with the template's text, in whichever place."""
    form = FORMS.setdefault(family.name, ChatFormat(family.tokenizer()))
    tokens = [*family.special, *family.plain]
    halves = [part for t in tokens for part in (t[: len(t) // 2], t[len(t) // 2 :], t[1:], t[:-1])]
    piece = st.sampled_from(
        [*tokens, *halves, "user", "assistant", "\n", " ", "|>", "<|", "a", "\ue000", "é"]
    )
    evil = data.draw(st.lists(piece, min_size=1, max_size=8).map("".join))
    tok = form.tokenizer
    for write in (
        lambda text: form.begin([{"role": "user", "content": text}]),
        lambda text: form.begin([{"role": "system", "content": text}, {"role": "user", "content": text}]),
        lambda text: form.observe("user", text),
        lambda text: form.observe("tool", text),
        lambda text: form.extend([{**RESULT, "content": text}], calls=[CALL]),
        lambda text: form.begin([USER, {"role": "assistant", "content": text}, NEXT]),
    ):
        try:
            harmless = write("x")
        except ChatError:
            continue
        ids = write(evil)
        control = form._encoder.control
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]
        text = tok.decode(ids)
        if not family.strip:
            assert evil.strip() in text or json.dumps(evil, ensure_ascii=False)[1:-1].strip() in text


def can(family: Family, use: ChatUse) -> bool:
    try:
        check_chat(family.tokenizer(), use, "model")
    except ConfigError:
        return False
    return True


def row(family: Family) -> list[str]:
    tok = family.tokenizer()
    stops = tok.convert_ids_to_tokens(list(ChatFormat(tok).stop_ids))
    tools = can(family, ChatUse(tools=True, observed=(), calls=True))
    if can(family, ChatUse(tools=tools, observed=("tool",))):
        result = "yes"
    else:
        result = (
            "with calls" if can(family, ChatUse(tools=tools, observed=("tool",), calls=True)) else "refused"
        )
    return [
        family.name,
        "yes" if can(family, ChatUse(first=("system", "user"))) else "refused",
        "yes" if tools else "refused",
        "yes" if tools and can(family, ChatUse(tools=True, calls=True)) else "refused",
        result,
        " ".join(f"`{t}`" for t in stops).replace("|", "\\|"),
    ]


def table() -> str:
    head = ["family", "system prompt", "tools", "users after tools", "tool results", "stops"]
    rows = [head, ["---"] * len(head), *map(row, FAMILIES)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def test_the_page_says_which_family_can_what() -> None:
    """The table of docs/models.md is what check_chat finds; `python -m tests.test_chat_templates` prints it."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in page


if __name__ == "__main__":
    print(table())
