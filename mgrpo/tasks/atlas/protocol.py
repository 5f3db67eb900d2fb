"""What the two agents may say, word by word.

    main   <q> people of neighbour of country of Dodoma <go>
           <call> REL ENT .      ->  <res> V           at most MAX_CALLS; V is the sub's answer or `none`
           <ans> X .             ends
    sub    <task> REL of ENT <go>
           <search> X .          ->  <res> T1 T2 T3    once, first
           <open> T .            ->  <doc> ...         once or twice, T among the results
           <ans> FIELD VALUE .   ends; only VALUE goes back to the main agent

Every turn has a fixed number of words and ends with the stop word. Anything else is a deviation: it ends the
trajectory with format 0, and a sub-agent that deviates has answered `none`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mgrpo.tasks.atlas.facts import NONE, RELATIONS, entities

PAD, STOP, GO, OF = "<pad>", ".", "<go>", "of"
QUESTION, TASK, CALL, SEARCH, OPEN, ANSWER = "<q>", "<task>", "<call>", "<search>", "<open>", "<ans>"
RESULT, DOCUMENT = "<res>", "<doc>"
CONTROL = (PAD, STOP, GO, OF, QUESTION, TASK, CALL, SEARCH, OPEN, ANSWER, RESULT, DOCUMENT, NONE)

MAX_CALLS = 4
MAX_OPENS = 2
TURN_WORDS = 4
"""Words of the longest turn, the stop word included."""
MAX_WORDS = {"main": 40, "sub": 64}
"""Bound on a whole trajectory of a role, in words (= tokens of the built-in tokenizer)."""

_RESERVED = frozenset((*CONTROL, *RELATIONS))


def vocabulary() -> tuple[str, ...]:
    """All words in the order of their token ids: control words, relations, then every entity."""
    return (*CONTROL, *RELATIONS, *entities())


def is_name(word: str) -> bool:
    return word not in _RESERVED


@dataclass(frozen=True, slots=True)
class Call:
    """The main agent delegates: what is `relation` of `entity`?"""

    relation: str
    entity: str


@dataclass(frozen=True, slots=True)
class Search:
    query: str


@dataclass(frozen=True, slots=True)
class Open:
    title: str


@dataclass(frozen=True, slots=True)
class Answer:
    """`field` is the relation a sub-agent says it read; the main agent names none."""

    value: str
    field: str | None = None


SubState = Literal["search", "open", "read", "last"]
"""Where a sub-agent stands: it must search; must open; may open or answer; must answer."""


def main_prompt(question: str) -> str:
    return f"{QUESTION} {question} {GO}"


def sub_prompt(call: Call) -> str:
    return f"{TASK} {call.relation} {OF} {call.entity} {GO}"


def results(titles: Sequence[str]) -> str:
    return " ".join((RESULT, *titles))


def parse_main(text: str) -> Call | Answer | None:
    """One turn of the main agent; None is a deviation."""
    match text.split():
        case ["<call>", relation, entity, "."] if relation in RELATIONS and is_name(entity):
            return Call(relation, entity)
        case ["<ans>", value, "."] if value == NONE or is_name(value):
            return Answer(value)
    return None


def parse_sub(text: str, state: SubState) -> Search | Open | Answer | None:
    """One turn of a sub-agent in `state`; None is a deviation."""
    match text.split():
        case ["<search>", query, "."] if state == "search" and is_name(query):
            return Search(query)
        case ["<open>", title, "."] if state in ("open", "read"):
            return Open(title)
        case ["<ans>", field, value, "."] if state in ("read", "last"):
            if field in RELATIONS and (value == NONE or is_name(value)):
                return Answer(value, field)
    return None
