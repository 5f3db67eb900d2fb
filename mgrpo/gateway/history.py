"""Whose history a request goes on with: messages in a normal form, compared with what conversations have said.

    request's messages --entry()--> [Entry, ...] --extended() / rewritten()--> Match, or None: another conversation

A program sends its whole history with every turn. It is compared message by message with the normal forms that were
kept of the last turn; nothing is rendered or encoded here. Two messages are the same whatever their content was wrapped
in (None, a list of parts), however the JSON of a call's arguments is written, and whatever their calls' ids are: ids
only tell apart conversations that have said the same. White space counts. Thoughts that were left out are noticed and
otherwise pass; thoughts that were changed are another history.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from mgrpo.model.chat import Message


@dataclass(frozen=True, slots=True)
class Entry:
    """One message in normal form. calls: (name, arguments as canonical JSON) each. reasoning: thoughts apart from the
    content. ids: of its calls, or of the call that it answers. raw: of a sampled turn, its text as it was sampled,
    thoughts and calls included."""

    role: str
    content: str
    calls: tuple[tuple[str, str], ...] = ()
    name: str = ""
    reasoning: str = field(default="", compare=False)
    ids: tuple[str, ...] = field(default=(), compare=False)
    raw: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Past:
    """What the current segment of a conversation has said, as its program has it. first: messages that it began with.
    tools: that it began with, each as canonical JSON."""

    entries: Sequence[Entry]
    first: int
    tools: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Match:
    """How a request goes on with a conversation. new: number of the first message that it has not seen. exact: the
    history is what was said. thoughts: but some were left out. placed: not exact, but it is clear which of its messages
    stands for the last reply."""

    new: int
    exact: bool
    thoughts: bool = False
    placed: bool = False


# -- normal form --


def entry(message: Message) -> Entry:
    """The normal form. Raises ValueError for what is no message of Chat Completions."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"the role of a message is {role!r:.50}, expected a text")
    role = "system" if role == "developer" else role
    content = text_of(message.get("content"), "" if role == "assistant" else "\n")
    if role != "assistant":
        answered = message.get("tool_call_id")
        name = message.get("name")
        return Entry(
            role,
            content,
            name=name if isinstance(name, str) and role != "tool" else "",
            ids=(answered,) if isinstance(answered, str) else (),
        )
    calls = [function_of(call) for call in message.get("tool_calls") or ()]
    return Entry(
        role,
        content,
        tuple((name, canonical(arguments)) for _, name, arguments in calls),
        reasoning=text_of(message.get("reasoning_content") or message.get("reasoning"), ""),
        ids=tuple(call_id for call_id, _, _ in calls),
    )


def text_of(content: object, between: str) -> str:
    """A content as text: None is "", a list of text parts is joined with `between`. Raises ValueError for others."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"the content of a message is of type {type(content).__name__}, expected text")
    texts = []
    for part in content:
        said = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(said, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a part of a message's content is {kind!r:.50}, expected text")
        texts.append(said)
    return between.join(texts)


def function_of(call: object) -> tuple[str, str, object]:
    """(id, name, arguments as they were given) of an entry of `tool_calls`. Raises ValueError for what is none."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ValueError(f"a tool call is {call!r:.100}, expected {{'id', 'type': 'function', 'function'}}")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a tool call is {name!r:.50}, expected a text")
    return str(call.get("id") or ""), name, function.get("arguments")


def arguments_of(arguments: object) -> Any:
    """Arguments as JSON values: text that holds JSON is read, any other stays text, as do NaN and what is infinite."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return read_json(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, NaN and infinite numbers included, RecursionError
    for what is nested too deep."""
    return json.loads(text, parse_float=_number, parse_constant=_number)


def canonical(value: object) -> str:
    """JSON that is equal for equal values, of arguments as arguments_of reads them. Raises ValueError for an object
    that JSON cannot hold."""
    try:
        return _dumped(arguments_of(value))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(value, str):
            return _dumped(value)
        raise ValueError(f"an object of tool calls or tools cannot be written as JSON: {error}") from None


def _dumped(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _number(text: str) -> float | int:
    """1.0 is 1, as JavaScript writes it."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is no number of JSON")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def digest(role: str, entries: Sequence[Entry], tools: frozenset[str]) -> bytes:
    """16 bytes that follow from a role, the first messages of a conversation and its tools; not from ids of calls."""
    said = [[e.role, e.content, e.calls, e.name, e.reasoning] for e in entries]
    text = json.dumps([role, said, sorted(tools)], ensure_ascii=True)
    return blake2b(text.encode(), digest_size=16).digest()


# -- comparison --


def same(said: Entry, now: Entry) -> bool:
    """Whether `now` is the message `said`, or that without its thoughts."""
    if said == now:
        return not now.reasoning or now.reasoning == said.reasoning
    return (
        said.raw is not None
        and now.role == "assistant"
        and now.content == said.raw
        and now.calls in ((), said.calls)
    )


def left_out(said: Entry, now: Entry) -> bool:
    """Of two that are the same: whether thoughts were left out."""
    return bool(said.reasoning) and not now.reasoning and now.content != said.raw


def extended(past: Past, now: Sequence[Entry]) -> Match | None:
    """The request's messages begin with all that was said, and go on with others' messages. None where not."""
    n = len(past.entries)
    if len(now) <= n or any(e.role == "assistant" for e in now[n:]):
        return None
    if not all(map(same, past.entries, now)):  # as far as the shorter reaches
        return None
    return Match(n, exact=True, thoughts=any(map(left_out, past.entries, now)))


def repeats(past: Past, now: Sequence[Entry]) -> bool:
    """Whether the request's messages are just what the conversation was asked with."""
    return len(past.entries) == len(now) and all(map(same, past.entries, now))


def rewritten(past: Past, now: Sequence[Entry], *, sole: bool) -> Match | None:
    """The request goes on with this conversation, though not from what it has said. None: it is another's.

    sole: it can be no other's (main's, or its number was named). Otherwise it is this one's where it begins with the
    same first messages and has replies behind them, or where its last reply, and what that answers, are the last
    things said. The place of the last reply is clear where these are, or where there are as many replies as were said.
    """
    replies = [i for i, e in enumerate(now) if e.role == "assistant"]
    last = replies[-1] if replies else -1
    first = past.first
    begins = len(now) > first and all(map(same, past.entries[:first], now))
    tail = len(past.entries) > 1 and last > 0 and all(map(same, past.entries[-2:], now[last - 1 : last + 1]))
    if not (sole or tail or (begins and last >= first)):
        return None
    as_many = len(replies) == sum(e.role == "assistant" for e in past.entries)
    placed = 0 <= last < len(now) - 1 and (tail or (as_many and (sole or begins)))
    return Match(last + 1, exact=False, placed=placed)


def likeness(past: Past, now: Sequence[Entry]) -> tuple[int, int, int]:
    """How much a history that was rewritten has of a conversation's: more is likelier to be its own."""
    equal = sum(map(same, past.entries, now))
    said = past.entries[-1].content if past.entries else ""
    kept = next((said in e.content for e in reversed(now) if said and e.role == "assistant"), False)
    return equal, int(kept), shared_ids(past, now)


def shared_ids(past: Past, now: Sequence[Entry]) -> int:
    """Messages whose ids of calls are those that were given."""
    return sum(bool(a.ids) and a.ids == b.ids for a, b in zip(past.entries, now, strict=False))


def best(
    pasts: Sequence[Past], matches: Sequence[Match | None], key: Callable[[int], Any]
) -> tuple[int, Match] | None:
    """(number, match) of the one whose key is largest, the earliest of several; None where nothing matches."""
    found = [(i, m) for i, m in enumerate(matches) if m is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else max(found, key=lambda pair: (key(pair[0]), -pair[0]))


def choose_extended(pasts: Sequence[Past], now: Sequence[Entry]) -> tuple[int, Match] | None:
    """Which of them the request extends exactly: the one with all thoughts, then the one whose ids it has."""
    matches = [extended(past, now) for past in pasts]

    def key(i: int) -> tuple[bool, int]:
        match = matches[i]
        return match is not None and not match.thoughts, shared_ids(pasts[i], now)

    return best(pasts, matches, key)


def choose_rewritten(pasts: Sequence[Past], now: Sequence[Entry], *, sole: bool) -> tuple[int, Match] | None:
    """Which of them the request goes on with although it is not what was said: one with a clear place, then the one
    that is most like it."""
    matches = [rewritten(past, now, sole=sole) for past in pasts]

    def key(i: int) -> tuple[bool, tuple[int, int, int]]:
        match = matches[i]
        return match is not None and match.placed, likeness(pasts[i], now)

    return best(pasts, matches, key)


def accepted(past: Past, now: Sequence[Entry], match: Match) -> Past:
    """What was said once a conversation goes on with the request in its segment: as it was said where the program has
    it so, as the program has it otherwise."""
    old = past.entries
    entries = [
        old[i] if i < min(match.new, len(old)) and same(old[i], e) and not left_out(old[i], e) else e
        for i, e in enumerate(now)
    ]
    if match.exact:
        return Past(entries, past.first, past.tools)
    shots = sum(e.role == "assistant" for e in old[: past.first])  # replies that it began with
    replies = [i for i, e in enumerate(entries) if e.role == "assistant"]
    first = replies[shots] if shots < len(replies) else min(past.first, match.new)
    return Past(entries, first, past.tools)


def difference(past: Past, now: Sequence[Entry]) -> str:
    """Where a history is not what was said, for people."""
    pairs = enumerate(zip(past.entries, now, strict=False))
    at = next((i for i, (a, b) in pairs if not same(a, b)), min(len(past.entries), len(now)))
    if at >= len(now):
        return f"it ends before message {at}, of {len(past.entries)} that were said"
    if at >= len(past.entries):
        at = next((i for i in range(at, len(now)) if now[i].role == "assistant"), at)
        return f"message {at} is the assistant's, and was not sampled here"
    said, given = past.entries[at], now[at]
    if said == given:
        return f"message {at} has other thoughts"
    if said.calls != given.calls and said.content == given.content:
        return f"message {at} has the calls {given.calls!r:.100}, not {said.calls!r:.100}"
    return f"message {at} is {given.role}: {given.content!r:.80}, not {said.role}: {said.content!r:.80}"
