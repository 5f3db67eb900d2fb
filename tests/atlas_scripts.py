"""Policies for the atlas tests that follow a script instead of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mgrpo.environments.episode import Agent
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.tasks.atlas.language import language
from mgrpo.tasks.words.protocol import NONE, Language
from mgrpo.tasks.words.questions import plan_of

Script = Callable[[list[str]], str]
"""All words of a trajectory so far -> the next turn."""


class Words:
    """A task's vocabulary as a tokenizer, without transformers; atlas' where no other is given."""

    def __init__(self, of: Language | None = None) -> None:
        self.words = (of or language()).vocabulary
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [self.ids.get(word, self.ids[NONE]) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in token_ids)


def scripted(role: str, script: Script, max_length: int = 64, of: Language | None = None) -> Agent:
    words = Words(of)
    engine = ScriptedEngine(lambda text: script(text.split()), words)
    return Agent(role, engine, words, 1.0, max_length)


def gold_main(said: list[str]) -> str:
    """Follows the plan innermost first and answers with the last result."""
    question = " ".join(said[1 : said.index("<go>")])
    from mgrpo.environments.task import Question

    plan = plan_of(Question(question, ""))
    results = [said[i + 1] for i, word in enumerate(said) if word == "<res>"]
    entity = results[-1] if results else said[said.index("<go>") - 1]
    if len(results) == len(plan):
        return f"<ans> {entity} ."
    return f"<call> {plan[len(results)]} {entity} ."


def gold_sub(said: list[str]) -> str:
    """Searches the entity, opens the document of that title, reads the asked relation."""
    relation, entity = said[1], said[3]
    if "<doc>" in said:
        document = said[said.index("<doc>") + 2 :]
        fields = dict(zip(document[::2], document[1::2], strict=False))
        return f"<ans> {relation} {fields.get(relation, NONE)} ."
    return f"<open> {entity} ." if "<res>" in said else f"<search> {entity} ."


def lines(*turns: str) -> Script:
    """Says the given turns one after the other, whatever happens."""
    left = list(turns)
    return lambda said: left.pop(0)
