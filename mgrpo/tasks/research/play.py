"""One rollout of tasks/research: who speaks when, which calls are made, what is noted of them.

    main:  turn -> its calls, all at once -> results -> turn ... -> answer
    sub:   task -> turn -> its calls -> results -> turn ... -> report, which is main's result

Sub-agents are opened in the order of the calls and then run at the same time; each has a seed of its own, so what they
sample does not depend on who is first. A call that cannot be made (unknown tool, arguments that do not fit, too many
calls, a task that leaves a sub-agent no room) is answered with an error that the policy sees. Where a service fails,
the exception leaves play(): no policy ever reads of it.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mgrpo.environments.episode import Agent, Conversation, Episode
from mgrpo.environments.task import Question
from mgrpo.model.chat import ChatFormat
from mgrpo.tasks.research.options import ResearchOptions
from mgrpo.tasks.research.prompts import NO_REPORT, TASK
from mgrpo.tasks.research.roles import Role
from mgrpo.tasks.research.talk import Start, Talk, shortened
from mgrpo.tools.base import Observation
from mgrpo.tools.calls import Call
from mgrpo.types import MAIN

ARGUMENT_CHARS = 300
"""Characters of a call's arguments in the record."""
NO_CALL = "none"
"""What the record calls the tool of a turn without one."""


class Setting(Protocol):
    """What a rollout needs of its task."""

    options: ResearchOptions
    team: Mapping[str, Role]

    def form(self, agent: Agent) -> ChatFormat: ...

    def other_query(self, query: str) -> str: ...


@dataclass(slots=True)
class Ended:
    """One agent's trajectory. said: its answer or report; None: it gave none. pages: what it read beside searches."""

    conversation: Conversation
    said: str | None
    format: float
    task: str
    pages: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Work:
    """What one agent has at hand while it works."""

    role: Role
    conversation: Conversation
    pages: list[str] = field(default_factory=list)
    errors: int = 0


class Play:
    """The agents of one rollout. After main(): subs (in order of role and invocation), calls and tools for the
    record."""

    def __init__(self, setting: Setting, question: Question, episode: Episode) -> None:
        self._setting, self._question, self._episode = setting, question, episode
        self._limits = setting.options.limits
        self._subs: dict[tuple[str, int], Ended] = {}
        self._tools: list[tuple[tuple[str, int, int, int], dict[str, Any]]] = []
        self.calls: list[dict[str, Any]] = []
        self.blocked = 0

    @property
    def subs(self) -> list[Ended]:
        return [self._subs[key] for key in sorted(self._subs)]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The calls that were made or refused: main's first, then by role, invocation, turn and place in it."""
        ordered = sorted(self._tools, key=lambda item: (item[0][0] != MAIN, *item[0]))
        return [record for _, record in ordered]

    async def main(self) -> Ended:
        """The whole rollout but its scores. Raises ContextOverflowError for a question that leaves no room."""
        files = [path.rpartition("/")[2] for path in self._question.attachments]
        text = self._question.text + (f"\n\nFiles: {', '.join(files)}" if files else "")
        start = self._start(MAIN, text)
        return await self._agent(MAIN, start, self._episode.open(MAIN), text)

    def _start(self, name: str, text: str) -> Start:
        form = self._setting.form(self._episode.agents[name])
        return self._setting.team[name].start(form, text)

    async def _agent(self, name: str, start: Start, conversation: Conversation, task: str) -> Ended:
        """One agent from its first turn to its answer or report."""
        work = Work(self._setting.team[name], conversation)
        talk, said = Talk(conversation, start), None
        while said is None and (turn := await talk.turn()) is not None:
            final = next((call for call in turn.calls if call.name == work.role.manner.final), None)
            if final is not None and (found := self._final(final)) is not None:
                said, plain = found
                talk.grade(turn.strict and plain and len(turn.calls) == 1)
            elif not talk.forced:
                known = [self._fits(work.role, call) for call in turn.calls]
                talk.grade(turn.strict and all(known))
                talk.observe(await self._results(work, talk.turns - 1, turn.calls))
        for metric, value in (
            ("turns", talk.turns), ("forced", talk.forced), ("cut_results", talk.cut), ("tool_errors", work.errors)
        ):  # fmt: skip
            conversation.metric(metric, value)
        conversation.release()
        strict = self._setting.options.score.format == "strict"
        return Ended(conversation, said, talk.format(said is not None, strict=strict), task, work.pages)

    def _final(self, call: Call) -> tuple[str, bool] | None:
        """(answer or report, whether its arguments are as asked); None where there are no words in it."""
        given = dict(call.arguments)
        value = given.get(call.name, next(iter(given.values())) if len(given) == 1 else None)
        plain = given.keys() == {call.name} and isinstance(value, str)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        text = str(value).strip()
        return (text[: self._limits.report_chars], plain) if text else None

    def _fits(self, role: Role, call: Call) -> bool:
        """Whether a call is one that the role's tools describe."""
        if call.name in role.delegates:
            task = call.arguments.get(TASK)
            return call.arguments.keys() == {TASK} and isinstance(task, str) and bool(task.strip())
        return not call.problem and role.tools.fits(call.name, call.arguments)

    # -- calls --

    async def _results(self, work: Work, turn: int, calls: Sequence[Call]) -> list[tuple[str, Observation]]:
        """What each call gives, in their order; they run at the same time."""
        begun: list[Observation | asyncio.Task[Observation]] = []
        async with asyncio.TaskGroup() as group:
            for number, call in enumerate(calls):
                found = self._begin(work, (turn, number), call)
                begun.append(found if isinstance(found, Observation) else group.create_task(found))
        seen = [one if isinstance(one, Observation) else one.result() for one in begun]
        for number, (call, observation) in enumerate(zip(calls, seen, strict=True)):
            work.errors += observation.status == "tool_error"
            self._note(work, (turn, number), call, observation)
        return [(call.name, observation) for call, observation in zip(calls, seen, strict=True)]

    def _begin(
        self, work: Work, at: tuple[int, int], call: Call
    ) -> Observation | Coroutine[Any, Any, Observation]:
        """A call under way, or why it is not made."""
        role, most = work.role, self._limits.calls
        if call.problem:
            return refused(f"{call.problem}.")
        if at[1] >= most:
            return refused(f"Not called: at most {most} calls in one turn.")
        if call.name in role.delegates:
            return self._begin_task(role.delegates[call.name], call)
        if call.name == role.manner.final:
            return refused(f"Its argument {call.name!r} must be a text, and not empty.")
        if call.name not in role.tools.names:
            names = ", ".join([*role.delegates, *role.tools.names, role.manner.final])
            return refused(f"There is no tool {call.name!r}. Tools: {names}.")
        return self._tool(work, at, call)

    async def _tool(self, work: Work, at: tuple[int, int], call: Call) -> Observation:
        conversation, arguments = work.conversation, dict(call.arguments)
        query = arguments.get("query")
        searches = call.name in work.role.searches
        if searches and self._setting.options.random_search and isinstance(query, str):
            arguments["query"] = self._setting.other_query(query)
        place = (work.role.name, conversation.invocation, *at)
        occurrence = "/".join(map(str, (self._episode.query, self._episode.rollout, *place)))
        made = functools.partial(work.role.tools.call, call.name, arguments, occurrence=occurrence)
        seen: Observation = await self._episode.tool(
            call.name, made, attempts=1
        )  # services retry by themselves
        self.blocked += seen.blocked
        if seen.status == "ok" and not searches:
            work.pages.append(shortened(seen.text, self._limits.observation_chars))
        return seen

    def _begin_task(self, sub: str, call: Call) -> Observation | Coroutine[Any, Any, Observation]:
        """Open a sub-agent for a task, or say why not."""
        task = call.arguments.get(TASK)
        if not isinstance(task, str) or not task.strip():
            return refused(f"Its argument {TASK!r} must be a text, and not empty.")
        if len(self.calls) >= self._limits.asks:
            return refused(
                f"Not called: at most {self._limits.asks} tasks can be given. Use what you know by now."
            )
        task = task.strip()[: self._limits.report_chars]
        start = self._start(sub, task)
        if start.least > self._episode.agents[sub].max_length:
            return refused("Not called: the task is too long for the sub-agent.")
        conversation = self._episode.open(sub)
        record = {"role": sub, "invocation": conversation.invocation, "task": task, "result": ""}
        self.calls.append(record)
        return self._sub(sub, start, conversation, record)

    async def _sub(
        self, name: str, start: Start, conversation: Conversation, record: dict[str, Any]
    ) -> Observation:
        ended = await self._agent(name, start, conversation, str(record["task"]))
        self._subs[name, conversation.invocation] = ended
        record["result"] = ended.said or ""
        return Observation(ended.said or NO_REPORT, status="ok" if ended.said else "empty")

    def _note(self, work: Work, at: tuple[int, int], call: Call, seen: Observation) -> None:
        turn, number = at
        invocation = work.conversation.invocation
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        record = {
            "role": work.role.name,
            "invocation": invocation,
            "turn": turn,
            "tool": call.name or NO_CALL,
            "arguments": arguments[:ARGUMENT_CHARS] if call.name else "",
            "status": seen.status,
            "source": seen.source,
            "seconds": round(seen.seconds, 6),
            "digest": seen.digest,
            "chars": len(seen.text),
        }
        self._tools.append(((work.role.name, invocation, turn, number), record))


def refused(words: str) -> Observation:
    """A call that is not made, in words for the policy."""
    return Observation(words[:1].upper() + words[1:], status="tool_error")
