"""One rollout while it happens: conversations that record what each agent saw and sampled, token by token.

    episode = Episode(query="7/3", rollout=2, agents={"main": agent, "sub": agent}, seed=...)
    main = episode.open("main")
    main.append("<q> capital of Fiji <go>")          # context: loss_mask 0
    text = await main.sample(max_tokens=8, stop=".")  # sampled by the policy: loss_mask 1, log-probs, versions
    sub = episode.open("sub")                         # invocation 0 of role "sub"
    ...
    sub.close(format=1.0, expert=1.0)
    main.close(format=1.0)
    rollout = episode.finish(correct=1.0)

or, in a model's own chat format:

    chat = Chat(episode.open("main"))
    chat.begin([{"role": "user", "content": question}])
    text = await chat.reply(max_tokens=256)
    chat.observe("user", "Result: 42")

The conversations themselves: conversation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from mgrpo.engines.base import SamplingParams
from mgrpo.environments.attempt import AttemptOverError
from mgrpo.environments.conversation import Agent, Conversation, finite_metric, mix, unit_score
from mgrpo.environments.tools import ToolCalls, outside_tools
from mgrpo.errors import RolloutError
from mgrpo.model.chat import ChatFormat, Message, Opening
from mgrpo.record import spans
from mgrpo.types import MAIN, Rollout

__all__ = ["Agent", "Chat", "Conversation", "Episode", "mix"]


class Chat:
    """A conversation in its model's chat format. What the template, tools and others write is context (mask 0)."""

    def __init__(self, conversation: Conversation, form: ChatFormat | None = None) -> None:
        """form: of the agent's tokenizer; make it once a task where many chats are opened."""
        self.conversation = conversation
        self.form = ChatFormat(conversation.agent.tokenizer) if form is None else form
        self._opening: Opening | None = None

    def begin(
        self, messages: Sequence[Message], tools: Sequence[object] | None = None, *, calls: bool = False
    ) -> None:
        """The first messages. calls: observe() will be given the calls of a turn. Raises as ChatFormat.open."""
        self.conversation.append_ids(self.opening(messages, tools, calls=calls))

    def opening(
        self, messages: Sequence[Message], tools: Sequence[object] | None = None, *, calls: bool = False
    ) -> list[int]:
        """The ids that begin() would append, to see whether the conversation has so many remaining. What follows is
        written as a continuation of these messages, and with these tools."""
        self._opening = self.form.open(messages, tools, calls=calls)
        return self._opening.ids

    async def reply(self, max_tokens: int) -> str:
        """Sample until its turn ends, or max_tokens; the text without the end token."""
        params = SamplingParams(max_tokens, self.conversation.agent.temperature, self.form.stop_ids)
        return self.form.text(await self.conversation.sample_ids(params))

    def observe(self, role: str, content: str, calls: Sequence[Mapping[str, object]] | None = None) -> None:
        """Another's message after the policy's turn, which is closed here if it ran into max_tokens. calls: the tool
        calls of that turn, for templates that write of them in a tool's result. Raises as ChatFormat.extend."""
        self.conversation.append_ids(self.observation(role, content, calls))

    def observation(
        self, role: str, content: str, calls: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """The ids that observe() would append, to see whether the conversation has so many remaining."""
        return self.observations([{"role": role, "content": content}], calls)

    def observations(
        self, messages: Sequence[Message], calls: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """As observation(), of several messages at once, e.g. the results of parallel tool calls."""
        last = self.conversation.last_sampled()
        return self.form.extend(messages, last=last, calls=calls, opening=self._opening)


class Episode:
    """The conversations of one attempt at a rollout: one of the main agent, any number of each sub-agent role."""

    def __init__(
        self,
        query: str,
        rollout: int,
        agents: Mapping[str, Agent],
        seed: int,
        attempt: int = 0,
        tools: ToolCalls | None = None,
    ) -> None:
        """tools: the calls of the rollout's earlier attempts, with which those of this one are counted."""
        self.query, self.rollout, self.agents, self.attempt = query, rollout, agents, attempt
        self._seed = mix(seed, rollout)
        self._tools = tools or ToolCalls()
        self._open: dict[str, list[Conversation]] = {role: [] for role in agents}
        self._opened_at: dict[str, list[int]] = {role: [] for role in agents if role != MAIN}
        self._over = False
        self._finished: Rollout | None = None
        self.metrics: dict[str, float] = {}

    def metric(self, name: str, value: float) -> None:
        """Report a number of this rollout, as Conversation.metric; the mean over rollouts becomes
        `rollout/task/<name>`."""
        self.metrics[name] = finite_metric(name, value, f"{self.query}/{self.rollout}")

    async def tool(
        self,
        name: str,
        call: Callable[..., Any],
        *args: object,
        timeout: float | None = None,
        attempts: int = 3,
        backoff: float = 0.5,
    ) -> Any:
        """What call(*args) returns: a coroutine function's result, or that of an ordinary one in a thread of its own.

        Tried again, up to `attempts` times in all, where the tool could not be reached (mgrpo/environments/tools.py);
        a call that may not be repeated gets attempts=1. timeout: seconds of one attempt, without those in which it
        waits for a service that is down; a thread cannot be ended, its late result is thrown away. backoff: seconds
        before the second attempt; doubles each time, +-50 % by the rollout's seed. Measured as
        `rollout/tool/<name>/{seconds,calls,retries,failures}`. No agent may sample in it.

        Raises InfrastructureError naming the tool where the last attempt failed, AttemptOverError once the episode has
        ended, ValueError for a name that is no identifier or bounds that are none, and what else `call` raises.
        """
        if self._over:
            raise AttemptOverError(f"{self.query}/{self.rollout} calls no tool: its attempt has ended")

        def noise(salt: int) -> float:
            return mix(self._seed, 1 << 40 | salt) / 2.0**64  # none of a conversation's

        run = self._tools.run
        seen: spans.Args = {"attempt": self.attempt, "retries": 0, "failed": 0}
        with spans.span("tool", name, f"{self.query}/{self.rollout}", seen):
            return await run(name, partial(call, *args), timeout, attempts, backoff, noise, seen)

    def open(self, role: str, salt: int | None = None) -> Conversation:
        """Start the next conversation of `role`. salt: what its noise follows from in place of its number, where
        conversations are opened in no certain order. Raises AttemptOverError once the episode has ended."""
        if self._over:
            raise AttemptOverError(
                f"{self.query}/{self.rollout} opens no conversation: its attempt has ended"
            )
        outside_tools(f"{self.query}/{self.rollout} opens a conversation")
        if role not in self._open:
            raise ValueError(f"unknown role {role!r}; this run has {sorted(self._open)}")
        mine = self._open[role]
        if role == MAIN and mine:
            raise ValueError("a rollout has one main trajectory; it is already open")
        place = sorted(self._open).index(role) << 16
        seed = mix(self._seed, place | len(mine))
        if salt is not None:
            seed = mix(mix(self._seed, 1 << 41 | place), salt)  # tools have 1 << 40
        if role != MAIN:
            self._opened_at[role].append(sum(len(main) for main in self._open[MAIN]))
        mine.append(self.conversation(self.agents[role], len(mine), seed))
        return mine[-1]

    def renumber(self, role: str, order: Sequence[int]) -> None:
        """Give the conversations of a sub-agent other numbers: order[i] is the present one of the i-th. Raises
        ValueError where these are not all of them."""
        mine, places = self._open[role], self._opened_at[role]
        if sorted(order) != list(range(len(mine))):
            raise ValueError(
                f"order {list(order)!r:.100} of role {role!r}, which has {len(mine)} conversations"
            )
        self._open[role], self._opened_at[role] = [mine[i] for i in order], [places[i] for i in order]
        for number, conversation in enumerate(self._open[role]):
            conversation.invocation = number

    def conversation(self, agent: Agent, invocation: int, seed: int) -> Conversation:
        """Make a conversation for open(); a subclass may make one that is watched."""
        return Conversation(agent, self.query, self.rollout, invocation, seed, self.attempt)

    def end(self) -> None:
        """Nothing more is opened or sampled: a task that still tries is cancelled."""
        self._over = True
        for conversation in self._conversations():
            conversation.end()

    def release(self) -> None:
        """Free what the engines hold for this rollout, once no call of it is under way any more. Idempotent."""
        for conversation in self._conversations():
            conversation.release()

    def record(self) -> None:
        """Keep the spans of the conversations, once, when the attempt has ended."""
        for conversation in self._conversations():
            conversation.record()

    def calls(self) -> int:
        """Conversations of sub-agents that were opened."""
        return sum(len(places) for places in self._opened_at.values())

    def mismatches(self) -> int:
        """Turns with a retokenization mismatch: their text does not encode back to the ids that were sampled (must stay
        0)."""
        return sum(conversation.mismatches for conversation in self._conversations())

    def finish(self, correct: float, **info: object) -> Rollout:
        """Close the rollout with the main agent's outcome in [0, 1]. info gets `opened_at`: for each sub-agent role
        the main agent's length in tokens when each invocation began.

        Raises RolloutError for an outcome that is no such number, for a conversation that was not closed or in which
        nothing was sampled, and for an info that cannot be recorded.
        """
        outcome = unit_score(correct, f"correct of {self.query}/{self.rollout}")
        if not self._open[MAIN]:
            raise RolloutError(
                f"{self.query}/{self.rollout} has no main trajectory: open({MAIN!r}) was not called"
            )
        (main,) = self._open[MAIN]
        subs = {r: [c.final_trajectory() for c in cs] for r, cs in self._open.items() if r != MAIN}
        final = main.final_trajectory()
        opened_at = {role: [min(at, len(final)) for at in places] for role, places in self._opened_at.items()}
        try:  # as the record will
            msgspec.msgpack.encode(info, enc_hook=str)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RolloutError(f"info of {self.query}/{self.rollout} cannot be recorded: {error}") from None
        self._finished = Rollout(
            self.query,
            self.rollout,
            final,
            subs,
            outcome,
            info | {"opened_at": opened_at},
            self._task_metrics(),
        )
        return self._finished

    def _task_metrics(self) -> dict[str, list[float]]:
        """Full name -> the values of all conversations, or of the rollout itself."""
        found = {f"rollout/task/{name}": [value] for name, value in self.metrics.items()}
        found |= self._tools.metrics()
        for conversation in self._conversations():
            for name, value in conversation.metrics.items():
                found.setdefault(f"{conversation.agent.role}/task/{name}", []).append(value)
        return found

    def check(self, rollout: object) -> Rollout:
        """`rollout` if it is the one that finish() returned last; RolloutError for anything else."""
        if self._finished is None or rollout is not self._finished:
            raise RolloutError(
                f"play() of {self.query}/{self.rollout} returned {_kind(rollout)}, expected what episode.finish() "
                "returned"
            )
        return self._finished

    def _conversations(self) -> list[Conversation]:
        return [conversation for conversations in self._open.values() for conversation in conversations]


def _kind(value: object) -> str:
    if isinstance(value, Rollout):
        return f"another Rollout ({value.query}/{value.rollout})"
    return "None" if value is None else f"an object of type {type(value).__name__}"
