"""One rollout: the main agent makes calls until it answers; a sub-agent searches, opens and answers each one, or, where
the main agent is alone, a tool that knows the corpus does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from mgrpo.environments.episode import Conversation, Episode
from mgrpo.environments.task import Question
from mgrpo.tasks.words.documents import Document
from mgrpo.tasks.words.protocol import (
    DOCUMENT,
    MAX_CALLS,
    NONE,
    RESULT,
    STOP,
    Answer,
    Call,
    Language,
    Open,
    Search,
    SubState,
    main_prompt,
    results,
    sub_prompt,
)
from mgrpo.tasks.words.search import Index
from mgrpo.tasks.words.world import World

SCORES = {"main": frozenset({"format"}), "sub": frozenset({"format", "expert"})}
"""What the trajectories of each role are scored for, beside the rollout's outcome."""


@dataclass(frozen=True, slots=True)
class Library:
    """What the tools know, and the words it is said in. `turn_tokens` bounds one turn of an agent."""

    language: Language
    world: World
    documents: Mapping[str, Document]
    index: Index
    turn_tokens: int

    def value(self, call: Call) -> str:
        """What the corpus says about a call, `none` where it says nothing."""
        return self.world.value(call.relation, call.entity) or NONE


@dataclass(frozen=True, slots=True)
class Finding:
    """What a sub-agent did with one call. `copied`: its answer stands in the document it opened last."""

    call: Call
    value: str
    well_formed: bool
    query: str | None
    opened: tuple[str, ...]
    copied: bool


@dataclass(frozen=True, slots=True)
class MainTrace:
    """What a main agent did: its calls with their results, and its answer (None after a deviation)."""

    calls: tuple[tuple[Call, str], ...]
    answer: str | None


Delegate = Callable[[Call], Awaitable[str]]


async def play_main(
    main: Conversation, question: Question, delegate: Delegate, library: Library
) -> MainTrace:
    """The main agent's side; `delegate` answers its calls. The caller closes the conversation."""
    calls: list[tuple[Call, str]] = []
    observation = main_prompt(question.text)
    while (text := await _turn(main, observation, library.turn_tokens)) is not None:
        move = library.language.parse_main(text)
        if isinstance(move, Answer):
            return MainTrace(tuple(calls), move.value)
        if move is None or len(calls) == MAX_CALLS:
            break
        value = await delegate(move)
        calls.append((move, value))
        observation = f"{RESULT} {value}"
    return MainTrace(tuple(calls), None)


async def play_sub(sub: Conversation, call: Call, library: Library) -> Finding:
    """One invocation; the conversation is closed with its format and expert scores.

    Expert rule: the answer equals what the corpus says about the call, `none` where it says nothing.
    """
    state: SubState = "search"
    found: tuple[str, ...] = ()
    opened: list[str] = []
    query: str | None = None
    answer: Answer | None = None
    observation = sub_prompt(call)
    while (text := await _turn(sub, observation, library.turn_tokens)) is not None:
        move = library.language.parse_sub(text, state)
        if isinstance(move, Search):
            with sub.tool_span("search"):
                query, found, state = move.query, library.index.search(move.query), "open"
            observation = results(found)
        elif isinstance(move, Open) and move.title in found:
            opened.append(move.title)
            state = "last" if len(opened) == library.language.max_opens else "read"
            with sub.tool_span("open"):
                observation = f"{DOCUMENT} {library.documents[move.title].text}"
        else:
            answer = move if isinstance(move, Answer) else None
            break
    value = answer.value if answer else NONE
    right = answer is not None and value == library.value(call)
    sub.close(format=float(answer is not None), expert=float(right))
    copied = answer is not None and answer.value == _read(library, opened[-1], answer.field)
    return Finding(call, value, answer is not None, query, tuple(opened), copied)


async def play(question: Question, episode: Episode, library: Library) -> tuple[MainTrace, list[Finding]]:
    """A whole rollout, all conversations closed. Without a sub-agent the corpus itself answers the main agent's
    calls."""
    findings: list[Finding] = []

    async def delegate(call: Call) -> str:
        if "sub" not in episode.agents:
            return library.value(call)
        findings.append(await play_sub(episode.open("sub"), call, library))
        return findings[-1].value

    main = episode.open("main")
    trace = await play_main(main, question, delegate, library)
    main.close(format=float(trace.answer is not None))
    return trace, findings


async def _turn(conversation: Conversation, observation: str, turn_tokens: int) -> str | None:
    """Show the agent something and let it speak; None when its trajectory has no room for both."""
    ids = conversation.encode(observation)
    if len(ids) + turn_tokens > conversation.remaining:
        return None
    conversation.append_ids(ids)
    return await conversation.sample(turn_tokens, STOP)


def _read(library: Library, title: str, field: str | None) -> str:
    value = library.documents[title].value(field) if field else None
    return value or NONE
