"""What the two agents may say, word by word, in the closed vocabulary of a task.

    main   <q> people of neighbour of country of Dodoma <go>
           <call> REL ENT .      ->  <res> V           at most MAX_CALLS; V is the sub's answer or `none`
           <ans> X .             ends
    sub    <task> REL of ENT <go>
           <search> T .          ->  <res> T1 T2 T3    once, first
           <open> T .            ->  <doc> ...         max_opens times at most, T among the results
           <ans> FIELD VALUE .   ends; only VALUE goes back to the main agent

T is an entity, or an entity and one of the language's sections: `Fiji Economy`.

Every turn has a fixed number of words and ends with the stop word. Anything else is a deviation: it ends the
trajectory with format 0, and a sub-agent that deviates has answered `none`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

PAD, STOP, GO, OF = "<pad>", ".", "<go>", "of"
QUESTION, TASK, CALL, SEARCH, OPEN, ANSWER = "<q>", "<task>", "<call>", "<search>", "<open>", "<ans>"
RESULT, DOCUMENT = "<res>", "<doc>"
NONE = "none"
"""The answer to a question without one."""
CONTROL = (PAD, STOP, GO, OF, QUESTION, TASK, CALL, SEARCH, OPEN, ANSWER, RESULT, DOCUMENT, NONE)

MAX_CALLS = 4
TURN_WORDS = 4
"""Words of the longest turn, the stop word included."""


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


@dataclass(frozen=True)
class Language:
    """The words of a task, and what of them is a turn."""

    relations: tuple[str, ...]
    """What the main agent can ask of an entity."""
    entities: tuple[str, ...]
    """Every name and every value."""
    fields: tuple[str, ...] = ()
    """What documents tell beside the relations."""
    sections: tuple[str, ...] = ()
    """Kinds of documents: with any, a query and a title are an entity and a section, without an entity alone."""
    homes: tuple[str, ...] = ()
    """The section that tells each relation, in the order of the relations; none where there are no sections."""
    results: int = 3
    """Titles that a search finds."""
    max_opens: int = 2

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """All words in the order of their token ids."""
        return (*CONTROL, *self.relations, *self.fields, *self.sections, *self.entities)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word -> token id."""
        return {word: i for i, word in enumerate(self.vocabulary)}

    @cached_property
    def _reserved(self) -> frozenset[str]:
        return frozenset((*CONTROL, *self.relations, *self.fields, *self.sections))

    def is_name(self, word: str) -> bool:
        return word not in self._reserved

    def is_title(self, words: Sequence[str]) -> bool:
        """Whether words form a title or a query; there need not be such a document."""
        entity, *section = words or ("",)
        named = len(section) == 1 and section[0] in self.sections if self.sections else not section
        return bool(entity) and named and self.is_name(entity)

    def parse_main(self, text: str) -> Call | Answer | None:
        """One turn of the main agent; None is a deviation."""
        match text.split():
            case ["<call>", relation, entity, "."] if relation in self.relations and self.is_name(entity):
                return Call(relation, entity)
            case ["<ans>", value, "."] if value == NONE or self.is_name(value):
                return Answer(value)
        return None

    def parse_sub(self, text: str, state: SubState) -> Search | Open | Answer | None:
        """One turn of a sub-agent in `state`; None is a deviation."""
        match text.split():
            case ["<search>", *query, "."] if state == "search" and self.is_title(query):
                return Search(" ".join(query))
            case ["<open>", *title, "."] if state in ("open", "read") and self.is_title(title):
                return Open(" ".join(title))
            case ["<ans>", field, value, "."] if state in ("read", "last"):
                if field in (*self.relations, *self.fields) and (value == NONE or self.is_name(value)):
                    return Answer(value, field)
        return None
