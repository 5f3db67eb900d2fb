"""The task "research": agents with search, readers and other tools answer questions from files.

A main agent splits a question into tasks; sub-agents, one conversation a task, look things up with their tools and
report; main answers. Roles other than "main" are sub-agents, each with its own tools; main alone is the single agent
with all tools. Setting and rewards are those of M-GRPO (arXiv 2511.13288): main is paid for format and the answer, a
sub-agent for format, the answer and its own work (`expert`), and an invalid format earns 0.

    options.py   settings      calls.py   tool calls as text     prompts.py   words that agents are given
    roles.py     the team      talk.py    turns and room         play.py      one rollout
    scoring.py   what counts as right

1. The paper prints neither prompts nor the judge, the rubric, limits of results or the form of calls: these are ours.
2. The main agent reads a sub-agent's own report. MrlX gives it a summary that another model writes.
3. Format is the share of an agent's well-formed turns by default, so that there is something to climb; the paper's is
   valid or not (score.format = "strict"). Either way no answer is format 0, which the gate of the reward turns into 0.
4. At its last turn, or where its length ends, an agent is asked for its answer; this is a turn like any other.
5. Failures of services never reach a policy and are never scored 0 (mgrpo/errors.py).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mgrpo.environments.episode import Agent, Episode, mix
from mgrpo.environments.failure import failure_of
from mgrpo.environments.task import Question, QuestionSource, Split, StartReport, Task
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.model.chat import ChatFormat
from mgrpo.model.chat_check import ChatUse
from mgrpo.services.cassette import Cassette
from mgrpo.tasks.research.options import read_options
from mgrpo.tasks.research.play import Play
from mgrpo.tasks.research.roles import Role, make_roles
from mgrpo.tasks.research.scoring import Scores
from mgrpo.tools.base import Tool
from mgrpo.tools.registry import build_tools
from mgrpo.tools.toolset import ToolSet
from mgrpo.types import MAIN, Rollout

BOUNDS = {"format": (0.05, 1.0), "correct": (0.0, 0.95)}
"""Of a valid start, format for each role: (low, high). Below, sampling finds no tool call to reinforce; above, nothing
is left to learn."""
START_ATTEMPTS = 3
"""At one question of the start validation, where a service fails."""


class ResearchTask(Task):
    """See the module's docstring. A task of one's own derives from it and replaces what it wants: make_questions,
    make_tools, own_tools, make_scores."""

    roles: tuple[str, ...] = (MAIN, "sub")
    chat = True
    controls = MappingProxyType({"random search": {"random_search": True}})

    def __init__(
        self, options: Mapping[str, object] = MappingProxyType({}), roles: Sequence[str] | None = None
    ) -> None:
        """Opens no connection. Raises ValueError and ConfigError for options that do not fit each other, the roles or
        what is installed."""
        self.options = read_options(dict(options))
        self.roles = tuple(self.roles if roles is None else roles)
        recorded = self.options.cassette
        self.cassette = None if recorded is None else Cassette(recorded.path, recorded.mode)
        self.source = self.make_questions()
        self.tools = self.make_tools()
        self.team: Mapping[str, Role] = make_roles(self.options, self.roles, self.tools)
        self.judged = self.make_scores()
        parts = {"format"} | ({"expert"} if self.judged.has_expert else set())
        self.scores = {role: frozenset({"format"} if role == MAIN else parts) for role in self.roles}
        manner = self.team[MAIN].manner
        self.chat_use = ChatUse(
            first=("system", "user"),
            observed=(manner.observed,),
            tools=manner.schemas is not None,
            template=self.options.template,
        )
        self._forms: dict[tuple[str, int], ChatFormat] = {}

    # -- parts that a task of one's own may replace --

    def make_questions(self) -> QuestionSource:
        """Where questions come from."""
        from mgrpo.benchmarks.question_file import QuestionFile

        return QuestionFile.of(self.options.questions)

    def make_tools(self) -> ToolSet:
        """All tools, from which options.agents chooses for each role."""
        built = build_tools(self.options.tools, self.cassette, blocked=self.options.blocked)
        own = self.own_tools()
        return built.plus(own) if own else built

    def own_tools(self) -> Sequence[Tool]:
        """Tools beside those of options.tools."""
        return ()

    def make_scores(self) -> Scores:
        """How answers and reports are scored."""
        return Scores(self.options.score, self.cassette)

    def single_agent(self, options: Mapping[str, object]) -> Mapping[str, object]:
        """The prompts and tools of a team go; main has those of options.single, or the default ones of an agent that is
        alone: every tool."""
        return {key: value for key, value in options.items() if key != "agents"}

    # -- questions --

    def question(self, index: int, seed: int) -> Question:
        return self.source.question(index, seed)

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return self.source.questions(split, n, seed)

    def other_query(self, query: str) -> str:
        """What the control `random_search` looks for in place of `query`: the text of a training question that has
        nothing to do with it. A function of the query alone."""
        number = int.from_bytes(hashlib.sha256(query.encode("utf-8", "replace")).digest()[:4], "big")
        return self.source.question(number, 0).text

    # -- rollouts --

    async def play(self, question: Question, episode: Episode) -> Rollout:
        play = Play(self, question, episode)
        main = await play.main()
        outcome, experts = await self.judged.of_rollout(
            question, main, play.subs, f"{episode.query}/{episode.rollout}"
        )
        main.conversation.close(format=main.format)
        for sub, expert in zip(play.subs, experts, strict=True):
            parts = {"format": sub.format} if expert is None else {"format": sub.format, "expert": expert}
            sub.conversation.close(**parts)
        episode.metric("judged", bool(outcome.judge))
        episode.metric("blocked", play.blocked)
        return episode.finish(
            outcome.correct,
            answer=main.said,
            gold=list(question.gold),
            question_id=question.id,
            tags=dict(question.tags),
            tools=play.tools,
            verdict=self.judged.record(outcome),
            calls=play.calls,
        )

    def form(self, agent: Agent) -> ChatFormat:
        """The chat format of the agent's model, made once. Raises ConfigError where it has no template, or where the
        agent's max_length leaves no room for a turn and an answer."""
        key = agent.role, agent.max_length
        found = self._forms.get(key)
        if found is None or found.tokenizer is not agent.tokenizer:
            found = ChatFormat(agent.tokenizer, **self.options.template)
            least = self.team[agent.role].start(found, "?").least
            if least > agent.max_length:
                limits = self.options.limits
                raise ConfigError(
                    f"agents.{agent.role}.max_length={agent.max_length} leaves no room: prompt, a turn of "
                    f"limits.turn_tokens={limits.turn_tokens} and an answer of "
                    f"limits.answer_tokens={limits.answer_tokens} take {least} tokens and the question's"
                )
            self._forms[key] = found
        return found

    # -- a run --

    async def preflight(self) -> None:
        """Tools can work, and the judge agrees with known verdicts. Raises ConfigError."""
        await self.tools.preflight()
        await self.judged.preflight()

    async def close(self) -> None:
        """Close tools and judges, also where one of them fails. Idempotent."""
        try:
            await self.tools.close()
        finally:
            await self.judged.close()
            if self.cassette is not None:
                self.cassette.close()

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        """The models as they are on n validation questions, sampled as in training: see BOUNDS. Raises
        InfrastructureError where a service fails START_ATTEMPTS times at one question."""
        questions = self.questions("validation", n, seed)
        try:
            async with asyncio.TaskGroup() as group:
                jobs = [group.create_task(self._tried(i, q, agents, seed)) for i, q in enumerate(questions)]
        except BaseExceptionGroup as errors:
            failure_of(errors, self)  # raises what ends a run
            raise errors.exceptions[0] from errors
        rollouts = [job.result() for job in jobs]
        found = {f"{MAIN}_format": [r.main.scores["format"] for r in rollouts]}
        for role in self.roles[1:]:
            found[f"{role}_format"] = [t.scores["format"] for r in rollouts for t in r.invocations[role]]
        figures = {name: (_mean(values), *BOUNDS["format"]) for name, values in found.items()}
        return StartReport(figures | {"correct": (_mean([r.correct for r in rollouts]), *BOUNDS["correct"])})

    async def _tried(
        self, number: int, question: Question, agents: Mapping[str, Agent], seed: int
    ) -> Rollout:
        for attempt in range(START_ATTEMPTS):
            episode = Episode(f"start/{number}", 0, agents, mix(seed, number), attempt)
            try:
                return await self.play(question, episode)
            except Exception as error:
                failure = failure_of(error, self)
                if failure.kind != "infrastructure":
                    raise
                last = failure.text
            finally:
                episode.end()
                episode.release()
                episode.record()
        raise InfrastructureError(f"start validation, question {number}: {last}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
