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

History is append-only: the ids that were sampled are the ids that are trained on; text is only ever decoded from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np

from mgrpo._C import philox4x32_10
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.attempt import AttemptOverError
from mgrpo.environments.tools import ToolCalls, outside_tools
from mgrpo.errors import ContextOverflowError, RolloutError
from mgrpo.model.chat import ChatFormat, Message, Opening
from mgrpo.model.tokens import Tokenizer, decode_piece, encode_piece, encode_start
from mgrpo.types import MAIN, Rollout, Trajectory


@dataclass(frozen=True, slots=True)
class Agent:
    """One role's policy as an episode sees it. max_length bounds a whole trajectory in tokens."""

    role: str
    engine: Engine
    tokenizer: Tokenizer
    temperature: float
    max_length: int


class Conversation:
    """One trajectory in the making."""

    def __init__(
        self, agent: Agent, query: str, rollout: int, invocation: int, seed: int, attempt: int = 0
    ) -> None:
        self.agent = agent
        self.query, self.rollout, self.invocation = query, rollout, invocation
        self.scores: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self.mismatches = 0  # retokenization: turns that training would see with other ids than were sampled
        self.last: Generation | None = None  # the turn that was sampled last
        self.closed = False
        self._over = False
        self._seed = seed
        self._turn = 0
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._seen: list[int] = []  # the history at the end of the last turn
        # The attempt is part of the name: what an engine still holds of a failed one is no history of the next.
        self._session = f"{query}/{rollout}/{attempt}/{agent.role}/{invocation}"

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def remaining(self) -> int:
        """Tokens left before max_length."""
        return self.agent.max_length - len(self._ids)

    def last_sampled(self) -> int:
        """The token the policy sampled last."""
        for token, sampled in zip(reversed(self._ids), reversed(self._mask), strict=True):
            if sampled:
                return token
        raise ValueError(f"nothing was sampled yet in {self._session}")

    def encode(self, text: str) -> list[int]:
        """The ids that append(text) would append, to see whether the conversation has so many remaining. Raises as
        mgrpo.model.tokens.encode_piece."""
        encode = encode_piece if self._ids else encode_start
        return encode(self.agent.tokenizer, text)

    def append(self, text: str) -> None:
        """Add context (prompt, tool output, another agent's words): seen by the policy, never trained on. Raises as
        encode() and append_ids()."""
        self.append_ids(self.encode(text))

    def append_ids(self, ids: Sequence[int]) -> None:
        """append() of token ids. Raises ContextOverflowError where fewer remain, ValueError for
        what is no token id."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < 1 << 31:
            raise ValueError(
                f"token ids {min(ids)}..{max(ids)} appended to {self._session} are outside 0..2**31 - 1"
            )
        if len(ids) > self.remaining:
            raise self._overflow(f"{len(ids)} more tokens of context")
        self._ids.extend(ids)
        self._mask.extend([0] * len(ids))
        self._logprobs.extend([0.0] * len(ids))
        self._versions.extend([-1] * len(ids))

    async def sample(self, max_tokens: int, stop: str) -> str:
        """Sample until the single token `stop`, or max_tokens; returns the decoded text. Raises as
        sample_ids()."""
        tokenizer = self.agent.tokenizer
        stop_ids = tuple(encode_piece(tokenizer, stop))
        if len(stop_ids) != 1:
            raise ValueError(
                f"stop {stop!r} is {len(stop_ids)} tokens for role {self.agent.role}, expected 1"
            )
        ids = await self.sample_ids(SamplingParams(max_tokens, self.agent.temperature, stop_ids))
        text = decode_piece(tokenizer, ids)
        self.mismatches += encode_piece(tokenizer, text) != ids
        return text

    async def sample_ids(self, params: SamplingParams) -> list[int]:
        """As sample(), in token ids. The noise is a function of (seed, rollout, role, invocation, turn). Raises
        ContextOverflowError where fewer than max_tokens remain, AttemptOverError once the episode has ended."""
        if self._over:
            raise AttemptOverError(f"{self._session} is not continued: its attempt has ended")
        if params.max_tokens > self.remaining:
            raise self._overflow(f"a turn of {params.max_tokens} tokens")
        self.mismatches += self._ids[: len(self._seen)] != self._seen
        outside_tools(f"{self._session} samples")
        out = await self.agent.engine.generate(
            self._ids, params, seed=mix(self._seed, self._turn), session=self._session
        )
        self._turn, self.last = self._turn + 1, out
        ids = [int(i) for i in out.token_ids]
        self._ids.extend(ids)
        self._mask.extend([1] * len(ids))
        self._logprobs.extend(float(x) for x in out.logprobs)
        self._versions.extend(int(v) for v in out.versions)
        self._seen = list(self._ids)
        return ids

    def _overflow(self, what: str) -> ContextOverflowError:
        role, limit = self.agent.role, self.agent.max_length
        return ContextOverflowError(
            f"{self._session}: {what} do not fit behind {len(self)} tokens of role {role!r}, max_length is {limit}; "
            f"set agents.{role}.max_length higher, or let the task cut what it appends to Conversation.remaining"
        )

    def close(self, **scores: float) -> None:
        """End the trajectory with its own reward parts, each in [0, 1]. Raises RolloutError for any other score."""
        self.scores = {
            name: unit_score(value, f"score {name!r} of {self._session}") for name, value in scores.items()
        }
        self.closed = True
        self.release()

    def metric(self, name: str, value: float) -> None:
        """Report a number of this conversation; the mean over its role's conversations becomes `<role>/task/<name>`. It
        takes no part in training. A later value of the same name replaces it. Raises RolloutError for a name that is no
        identifier and a value that is no finite number."""
        self.metrics[name] = finite_metric(name, value, self._session)

    def end(self) -> None:
        """Nothing more is sampled here: whoever tries is cancelled."""
        self._over = True

    def release(self) -> None:
        """Free what the engine holds of this conversation. Idempotent."""
        self.agent.engine.release(self._session)

    def trajectory(self) -> Trajectory:
        """The conversation so far, as arrays."""
        return Trajectory(
            query=self.query,
            rollout=self.rollout,
            role=self.agent.role,
            invocation=self.invocation,
            tokens=np.asarray(self._ids, np.int32),
            loss_mask=np.asarray(self._mask, np.uint8),
            logprobs=np.asarray(self._logprobs, np.float32),
            versions=np.asarray(self._versions, np.int32),
            scores=dict(self.scores),
        )

    def final_trajectory(self) -> Trajectory:
        """The whole of it. Raises RolloutError where it cannot be trained on."""
        if not self.closed:
            raise RolloutError(f"{self._session} was opened and never closed; close() it with its scores")
        if not any(self._mask):
            raise RolloutError(
                f"{self._session} has no sampled token among {len(self)}: nothing of it can be trained"
            )
        if not all(map(math.isfinite, self._logprobs)):
            at = next(i for i, x in enumerate(self._logprobs) if not math.isfinite(x))
            raise RolloutError(f"{self._session}: the log-prob of token {at} is {self._logprobs[at]}")
        return self.trajectory()


def unit_score(value: object, what: str) -> float:
    """`value` as a float in [0, 1]; RolloutError naming `what` for NaN, None, text or any other number."""
    number = _number(value)
    if not 0.0 <= number <= 1.0:
        raise RolloutError(f"{what} is {value!r:.100}, expected a number in [0, 1]")
    return number


def finite_metric(name: str, value: object, where: str) -> float:
    """`value` as a float; RolloutError for NaN, infinity, text or a name that is no identifier."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise RolloutError(f"metric {name!r:.100} of {where}: expected a name of letters, digits and _")
    number = _number(value)
    if not math.isfinite(number):
        raise RolloutError(f"metric {name!r} of {where} is {value!r:.100}, expected a finite number")
    return number


def _number(value: object) -> float:
    """`value` as a float; NaN for None, text or what is no number."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


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
        return await run(name, partial(call, *args), timeout, attempts, backoff, noise)

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
        try:  # as the record will
            msgspec.msgpack.encode(info, enc_hook=str)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RolloutError(f"info of {self.query}/{self.rollout} cannot be recorded: {error}") from None
        self._finished = Rollout(
            self.query,
            self.rollout,
            main.final_trajectory(),
            subs,
            outcome,
            info | {"opened_at": self._opened_at},
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


def mix(seed: int, salt: int) -> int:
    """A 64-bit seed derived from (seed, salt) by one Philox block."""
    words = philox4x32_10(
        [salt & 0xFFFFFFFF, (salt >> 32) & 0xFFFFFFFF, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    )
    return int(words[0]) | (int(words[1]) << 32)
