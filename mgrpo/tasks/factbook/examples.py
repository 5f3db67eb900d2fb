"""Worked examples as turns of the chat, for models that are too small to follow a description.

A model of 135M parameters that is told how a tool call looks answers in prose; one that has "said" two of them goes on
so. The examples are of an invented world: no name in them is in a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from mgrpo.model.chat import Message
from mgrpo.tasks.factbook.pages import ROOT
from mgrpo.tasks.research.prompts import ANSWER, ASK, REPORT
from mgrpo.tasks.research.roles import Role
from mgrpo.tools.calls import Format, render
from mgrpo.types import MAIN

Step = tuple[str, str, str]
"""What the agent reads, and the tool and argument of its call."""

LEADS: Sequence[Sequence[Step]] = (
    (
        ("What is the capital of Utopia?", ASK, "capital of Utopia"),
        ("Amaurot", ANSWER, "Amaurot"),
    ),
    (
        (
            "What is the currency of the largest export partner of Atlantis?",
            ASK,
            "largest export partner of Atlantis",
        ),
        ("Brobdingnag", ASK, "currency of Brobdingnag"),
        ("sprugs", ANSWER, "sprugs"),
    ),
    (
        ("What is the area in square kilometers of Lilliput?", ASK, "area of Lilliput"),
        ("912", ANSWER, "912"),
    ),
    (
        ("What is the median age in years of Laputa?", ASK, "median age of Laputa"),
        ("31.4", ANSWER, "31.4"),
    ),
)
LOOKS_UP: Sequence[Sequence[Step]] = (
    (
        ("capital of Utopia", "search", "Utopia capital"),
        (f"[1] Utopia: Government\n{ROOT}/utopia/government", "visit", f"{ROOT}/utopia/government"),
        ("Utopia: Government\n\nCapital\nname: Amaurot", REPORT, "Amaurot"),
    ),
    (
        ("largest export partner of Atlantis", "search", "Atlantis exports partners"),
        (f"[1] Atlantis: Economy\n{ROOT}/atlantis/economy", "visit", f"{ROOT}/atlantis/economy"),
        ("Atlantis: Economy\n\nExports - partners: Utopia 51%, Lilliput 7%", REPORT, "Utopia"),
    ),
)
_FIND, _READ = LOOKS_UP
ALONE: Sequence[Sequence[Step]] = (
    (("What is the capital of Utopia?", *_FIND[0][1:]), _FIND[1], (_FIND[2][0], ANSWER, "Amaurot")),
    (
        ("What is the capital of the largest export partner of Atlantis?", *_READ[0][1:]),
        _READ[1],
        (_READ[2][0], *_FIND[0][1:]),
        _FIND[1],
        (_FIND[2][0], ANSWER, "Amaurot"),
    ),
)
"""Of main without sub-agents: the same look-ups, one after the other."""
ARGUMENTS = {ASK: "task", "search": "query", "visit": "url", ANSWER: ANSWER, REPORT: REPORT}


LEAD_WORDS, LOOK_UP_WORDS = "Question: {}\nBegin with ask.", "Task: {}\nBegin with search."
ALONE_WORDS = "Question: {}\nBegin with search."
"""What stands around a question and a task: they name the tool to begin with."""


LEAD, THEIRS, MINE_ALONE = (LEADS, LEAD_WORDS), (LOOKS_UP, LOOK_UP_WORDS), (ALONE, ALONE_WORDS)


@dataclass(frozen=True, slots=True)
class ShownRole(Role):
    """A role whose chats begin with examples. words: with a place for the question or task."""

    examples: tuple[Message, ...] = ()
    words: str = "{}"

    def messages(self, text: str) -> list[Message]:
        system, question = Role.messages(self, self.words.replace("{}", text))
        return [system, *self.examples, question]


def with_examples(team: Mapping[str, Role], form: Format) -> dict[str, Role]:
    """The roles of a team, main and those that look things up, or main alone, with examples of what each does."""
    main = LEAD if len(team) > 1 else MINE_ALONE
    return {name: _shown(role, form, *(main if name == MAIN else THEIRS)) for name, role in team.items()}


def _shown(role: Role, form: Format, examples: Sequence[Sequence[Step]], words: str) -> ShownRole:
    messages: list[Message] = []
    for steps in examples:
        before = ""
        for read, tool, argument in steps:
            seen = f"Result of {before}:\n{read}" if before else words.replace("{}", read)
            messages.append({"role": "user", "content": seen})
            messages.append(
                {"role": "assistant", "content": render(form, (tool, {ARGUMENTS[tool]: argument}))}
            )
            before = tool
    kept = {field.name: getattr(role, field.name) for field in fields(Role)}
    return ShownRole(**kept, examples=tuple(messages), words=words)
