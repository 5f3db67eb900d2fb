"""What a turn does before it samples: continue a conversation, begin a new segment of one, or open the next.

    request, how it goes on with a conversation --next_step()--> Step, whose ids fit; or GatewayError: nothing is done

The policies of GatewayOptions (history, thoughts) are applied here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mgrpo.environments.episode import Agent, Conversation
from mgrpo.errors import ChatError
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.forms import Form
from mgrpo.gateway.history import Entry, Match, Past, accepted, difference
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.turn import TurnRequest
from mgrpo.model.chat import Opening

CHARACTERS = 64
"""Of a token, on the average over messages and tools: no text that fits has more. What has is refused before a chat
template and a tokenizer have worked on it for minutes, while all other rollouts of the worker wait."""


@dataclass(slots=True, eq=False)
class Thread:
    """A conversation as the program has it. opening: of its current segment. rank: what its noise, its ids and its
    number follow from: tokens that main had when it was opened, the digest of its first messages, its number among
    equal ones. turns: that were begun. last: the token sampled last; None: none was sampled."""

    conversation: Conversation
    form: Form
    opening: Opening
    past: Past
    rank: tuple[int, bytes, int]
    turns: int = 0
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A turn that may begin. thread: None where a conversation is opened. ids: to append, or all of a new segment.
    past: what is said once they are there. opening: of an opened conversation or segment. room: tokens left behind the
    ids. counts: what is to be counted, each once."""

    kind: Literal["open", "extend", "fork"]
    thread: Thread | None
    ids: Sequence[int]
    past: Past
    room: int
    opening: Opening | None = None
    counts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in normal form."""

    request: TurnRequest
    entries: Sequence[Entry]
    tools: frozenset[str]


def open_step(asked: Asked, agent: Agent, form: Form) -> Step:
    """Of a new conversation. Raises GatewayError (400) where its messages do not fit, and as Form.open."""
    _check_size(agent, asked.entries, asked.tools)
    opening = form.open(asked.request.messages, asked.entries, asked.request.tools)
    past = Past(asked.entries, len(asked.entries), asked.tools)
    return Step("open", None, opening.ids, past, _room(agent, 0, len(opening.ids)), opening)


def next_step(asked: Asked, thread: Thread, match: Match, options: GatewayOptions) -> Step:
    """Of a conversation that the request goes on with. Raises GatewayError: 409 for a history that the policy does not
    take, 400 for what does not fit; and as Form.open and Form.follow."""
    past, known = thread.past, asked.tools <= thread.past.tools
    counts = ["tools_changed"] if asked.tools != past.tools else []
    if match.thoughts:
        counts.append("thoughts_dropped")
    if match.exact and known:
        if match.thoughts and options.thoughts == "fork":
            return _fork(asked, thread, counts)
        try:
            return _extend(asked, thread, match, counts)
        except ChatError:
            if "fork" not in (options.history, options.thoughts):
                raise
            return _fork(asked, thread, counts)  # the template writes anew what came before
    if options.history == "fork":
        return _fork(asked, thread, counts)
    where = f"of role {asked.request.role!r}, invocation {thread.conversation.invocation}"
    if options.history == "keep" and (match.exact or match.placed):
        return _extend(asked, thread, match, [*counts, "rewritten"])
    what = (
        difference(past, asked.entries)
        if not match.exact
        else "it has tools that the conversation began without"
    )
    hint = 'history = "keep" or "fork"' if options.history == "exact" else 'history = "fork"'
    raise GatewayError(
        409, "history_rewritten", f"the history {where} is not what was said: {what}; {hint} takes it"
    )


def _extend(asked: Asked, thread: Thread, match: Match, counts: Sequence[str]) -> Step:
    agent = thread.conversation.agent
    _check_size(agent, asked.entries[match.new :], ())
    new = asked.request.messages[match.new :]
    ids = thread.form.follow(new, asked.entries, thread.opening, thread.last)
    room = _room(agent, agent.max_length - thread.conversation.remaining, len(ids))
    past = accepted(thread.past, asked.entries, match)
    past = replace(past, tools=past.tools | asked.tools)  # counted once
    return Step("extend", thread, ids, past, room, None, tuple(counts))


def _fork(asked: Asked, thread: Thread, counts: Sequence[str]) -> Step:
    agent = thread.conversation.agent
    _check_size(agent, asked.entries, asked.tools)
    opening = thread.form.open(asked.request.messages, asked.entries, asked.request.tools)
    past = Past(asked.entries, len(asked.entries), asked.tools)
    room = _room(agent, 0, len(opening.ids))
    return Step("fork", thread, opening.ids, past, room, opening, (*counts, "forks"))


def _check_size(agent: Agent, entries: Sequence[Entry], tools: Iterable[str]) -> None:
    """Raises GatewayError for messages and tools that are too long, or too many, by far."""
    if len(entries) > agent.max_length:
        raise _too_long(agent, f"{len(entries)} messages, each of a token at least")
    size = sum(map(len, tools))
    for e in entries:
        size += len(e.content) + len(e.reasoning) + sum(len(name) + len(given) for name, given in e.calls)
    if size > (most := CHARACTERS * agent.max_length):
        raise _too_long(agent, f"{size} characters, more than {most}, which no such context holds")


def _room(agent: Agent, before: int, new: int) -> int:
    """Tokens left for a turn. Raises GatewayError where there are none."""
    room = agent.max_length - before - new
    if room < 1:
        raise _too_long(agent, f"{before + new} tokens, which leaves no room for a turn")
    return room


def _too_long(agent: Agent, what: str) -> GatewayError:
    return GatewayError(
        400,
        "context_length_exceeded",
        f"this model's maximum context length is {agent.max_length} tokens (agents.{agent.role}.max_length); the "
        f"messages resulted in {what}",
    )
