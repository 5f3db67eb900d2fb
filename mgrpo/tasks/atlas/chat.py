"""The task "atlas-chat": atlas for pretrained instruction-tuned models, in their chat templates, with JSON tool calls.

Documents, search, questions, the exact match and the expert's rule are those of atlas. What differs:

1. The agents speak JSON (chat_calls.py) behind a system prompt and two examples, and observations name the next tool.
2. A turn that is understood without being exactly what was asked for goes on, and costs format: the format score of a
   trajectory is the share of its turns that were strict, and 0 unless it ends with an answer.
3. A sub-agent may search and open in any order, within `max_turns`; a title that was not found is answered so.
4. `hops` weighs questions by their number of relations: a small model has enough to do with one.

Only sampled tokens carry loss; the template, the example, tool results and the other agent's words are context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mgrpo.config.settings import first_problem
from mgrpo.environments.episode import Agent, Chat, Conversation, Episode, mix
from mgrpo.environments.task import Question, Split, StartReport, Task
from mgrpo.errors import ConfigError
from mgrpo.model.chat import ChatFormat
from mgrpo.model.chat_check import ChatUse
from mgrpo.tasks.atlas.chat_calls import (
    Message,
    ToolCall,
    main_messages,
    main_result,
    parse,
    sub_document,
    sub_messages,
    sub_titles,
)
from mgrpo.tasks.atlas.documents import build_documents
from mgrpo.tasks.atlas.facts import World
from mgrpo.tasks.atlas.questions import HOP_WEIGHTS, QuestionBank
from mgrpo.tasks.words.play import SCORES, Delegate
from mgrpo.tasks.words.protocol import MAX_CALLS, NONE, Call
from mgrpo.tasks.words.search import Index, SearchMode
from mgrpo.tasks.words.world import FactsMode
from mgrpo.types import MAIN, Rollout

BOUNDS = {"main_format": (0.05, 1.0), "sub_format": (0.05, 1.0), "joint_sampled": (0.0, 0.95)}
"""Of a valid start: name -> (low, high). Below, sampling finds no tool call to reinforce; above, nothing is left."""

NAMES = 32
"""Tokens that the names in a question may take."""


class ChatOptions(BaseModel):
    """[task.options] of the task atlas-chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: SearchMode = "bm25"
    """As in atlas."""
    facts: FactsMode = "real"
    """As in atlas. A pretrained model knows some of the real world by heart; of the permuted one nothing."""
    hops: tuple[float, float, float] = HOP_WEIGHTS
    """Weights of questions with one, two and three relations."""
    turn_tokens: int = Field(default=40, ge=8)
    """Most tokens of one turn. A tool call takes about 25."""
    max_calls: int = Field(default=MAX_CALLS, ge=1)
    """Sub-agents that one main agent may ask."""
    max_turns: int = Field(default=5, ge=3)
    """Turns of one sub-agent; a straight one takes three."""
    template: dict[str, Any] = Field(default_factory=dict)
    """Settings of the models' chat template, e.g. { enable_thinking = false }."""

    @field_validator("hops", mode="before")
    @classmethod
    def _weights(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples


@dataclass(slots=True)
class _Turns:
    """An agent's turns so far, for its format score."""

    taken: int = 0
    strict: int = 0

    def score(self, answered: bool) -> float:
        return self.strict / self.taken if answered else 0.0


class AtlasChatTask(Task):
    """See the module's docstring. Scores: main and sub `format`, sub `expert`; correct is exact match."""

    roles = ("main", "sub")
    chat = True
    scores = SCORES

    def __init__(self, options: Mapping[str, object], roles: Sequence[str] = roles) -> None:
        if set(roles) != set(self.roles):
            raise ValueError(f"roles {list(roles)} given, expected {list(self.roles)}")
        try:
            self.options = ChatOptions.model_validate(dict(options))
        except ValidationError as error:
            raise ValueError(first_problem(error, "options")) from None
        self.world = World(self.options.facts)
        self.documents = build_documents(self.world)
        self.index = Index(self.documents.values(), self.options.search)
        self.bank = QuestionBank(self.world, self.options.hops)
        roles_of_prompt = tuple(message["role"] for message in main_messages(""))  # a sub-agent's are alike
        self.chat_use = ChatUse(first=roles_of_prompt, template=self.options.template)
        self._forms: dict[tuple[str, int], ChatFormat] = {}

    def question(self, index: int, seed: int) -> Question:
        return self.bank.draw(index, seed)

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        """In the exact hop mix. ValueError when the split has no n distinct ones."""
        return self.bank.fixed(split, n, seed)

    async def play(self, question: Question, episode: Episode) -> Rollout:
        calls: list[dict[str, str]] = []
        opened: list[list[str]] = []

        async def delegate(call: Call) -> str:
            if not self._fits(episode.agents["sub"], call):
                return NONE
            value, titles = await self._sub(episode.open("sub"), call)
            calls.append({"relation": call.relation, "entity": call.entity, "result": value})
            opened.append(titles)
            return value

        main = episode.open("main")
        answer = await self._main(main, question, delegate)
        return episode.finish(
            float(answer == question.answer),
            answer=answer,
            gold=question.answer,
            real_answer=question.info.get("real_answer"),
            calls=calls,
            opened=opened,
        )

    async def _main(self, conversation: Conversation, question: Question, delegate: Delegate) -> str | None:
        """The main agent's side, closed with its format score; its answer, None without one."""
        talk = _Talk(self, conversation, main_messages(question.text))
        answer, asked = None, 0
        while (move := await talk.turn()) is not None:
            if move.name == "answer":
                answer = move.arguments["value"]
                break
            if asked == self.options.max_calls:
                break
            asked += 1
            talk.observe(main_result(await delegate(Call(**move.arguments))))
        conversation.close(format=talk.turns.score(answer is not None))
        return answer

    async def _sub(self, conversation: Conversation, call: Call) -> tuple[str, list[str]]:
        """One invocation, closed with its format and expert scores: its value, `none` without an answer, and the titles
        of the documents it opened."""
        talk = _Talk(self, conversation, sub_messages(call.relation, call.entity))
        answer: str | None = None
        found: list[str] = []
        opened: list[str] = []
        while talk.turns.taken < self.options.max_turns and (move := await talk.turn()) is not None:
            if move.name == "answer":
                answer = move.arguments["value"]
                break
            with conversation.tool_span(move.name):
                seen = self._tool(move, call.relation, found, opened)
            talk.observe(seen)
        truth = self.world.value(call.relation, call.entity) or NONE
        conversation.close(format=talk.turns.score(answer is not None), expert=float(answer == truth))
        return answer or NONE, opened

    def _tool(self, move: ToolCall, relation: str, found: list[str], opened: list[str]) -> str:
        """What a sub-agent's search or open returns; `found` and `opened` are brought up to date."""
        if move.name == "search":
            found[:] = self.index.search(move.arguments["query"])
            return sub_titles(found)
        title = move.arguments["title"]
        if title not in found:
            return f"There is no {title}. {sub_titles(found) if found else 'Search first.'}"
        opened.append(title)
        return sub_document(title, self.documents[title].fields, relation)

    def _fits(self, agent: Agent, call: Call) -> bool:
        """A call so long that the sub-agent could not say a word is not made at all: nothing of it would train."""
        prompt = self.form(agent).begin(sub_messages(call.relation, call.entity))
        return len(prompt) + self.options.turn_tokens <= agent.max_length

    def form(self, agent: Agent) -> ChatFormat:
        """The chat format of the agent's model, made once. Raises ConfigError where it has no template, or where the
        agent's max_length leaves no room for its first turn."""
        key = agent.role, agent.max_length
        found = self._forms.get(key)
        if found is None or found.tokenizer is not agent.tokenizer:
            found = ChatFormat(agent.tokenizer, **self.options.template)
            self._check_length(agent, found)
            self._forms[key] = found
        return found

    def _check_length(self, agent: Agent, form: ChatFormat) -> None:
        prompt = len(form.begin(main_messages("") if agent.role == MAIN else sub_messages("", "")))
        if (least := prompt + NAMES + self.options.turn_tokens) > agent.max_length:
            raise ConfigError(
                f"agents.{agent.role}.max_length={agent.max_length} leaves no room for a turn: the prompt takes "
                f"{prompt + NAMES} tokens, a turn {self.options.turn_tokens}; expected at least {least}"
            )

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        """The models as they are on n validation questions, sampled as in training: see BOUNDS."""
        questions = self.questions("validation", n, seed)

        async def one(i: int, question: Question) -> Rollout:
            return await self.play(question, Episode(f"start/{i}", 0, agents, mix(seed, i)))

        rollouts = await asyncio.gather(*(one(i, q) for i, q in enumerate(questions)))
        figures = {
            "main_format": _mean([r.main.scores["format"] for r in rollouts]),
            "sub_format": _mean([t.scores["format"] for r in rollouts for t in r.invocations["sub"]]),
            "joint_sampled": _mean([r.correct for r in rollouts]),
        }
        return StartReport({name: (figures[name], low, high) for name, (low, high) in BOUNDS.items()})


class _Talk:
    """One agent's side of its chat: turns within the conversation's remaining length."""

    def __init__(self, task: AtlasChatTask, conversation: Conversation, messages: Sequence[Message]) -> None:
        self.turns = _Turns()
        self._role = conversation.agent.role
        self._limit = task.options.turn_tokens
        self._conversation = conversation
        self._chat = Chat(conversation, task.form(conversation.agent))
        self._next = self._chat.opening(messages)  # what the agent sees before its next turn

    def observe(self, text: str) -> None:
        self._next = self._chat.observation("user", text)

    async def turn(self) -> ToolCall | None:
        """What the agent does next; None when it cannot be understood or its trajectory has no room."""
        if len(self._next) + self._limit > self._conversation.remaining:
            return None
        self._conversation.append_ids(self._next)
        move = parse(self._role, await self._chat.reply(self._limit))
        self.turns.taken += 1
        self.turns.strict += move is not None and move.strict
        return move


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
