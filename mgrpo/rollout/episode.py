"""One rollout while it happens: conversations that record what each agent saw and said, token by token.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mgrpo._C import philox4x32_10
from mgrpo.model.chat import ChatFormat, Message, Opening
from mgrpo.rollout.engine import Engine, SamplingParams
from mgrpo.types import MAIN, Rollout, Trajectory


class Tokenizer(Protocol):
    """What an episode needs of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


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

    def __init__(self, agent: Agent, query: str, rollout: int, invocation: int, seed: int) -> None:
        self.agent = agent
        self.query, self.rollout, self.invocation = query, rollout, invocation
        self.scores: dict[str, float] = {}
        self.drift = 0  # turns that training would see with other ids than were sampled
        self._seed = seed
        self._turn = 0
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._said: list[int] = []  # the history at the end of the last turn
        self._session = f"{query}/{rollout}/{agent.role}/{invocation}"

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def room(self) -> int:
        """Tokens left before max_length."""
        return self.agent.max_length - len(self._ids)

    def last_sampled(self) -> int:
        """The token the policy sampled last."""
        for token, sampled in zip(reversed(self._ids), reversed(self._mask), strict=True):
            if sampled:
                return token
        raise ValueError(f"nothing was sampled yet in {self._session}")

    def append(self, text: str) -> None:
        """Add context (prompt, tool output, another agent's words): seen by the policy, never trained on."""
        self.append_ids(self.agent.tokenizer.encode(text, add_special_tokens=False))

    def append_ids(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self._mask.extend([0] * len(ids))
        self._logprobs.extend([0.0] * len(ids))
        self._versions.extend([-1] * len(ids))

    async def sample(self, max_tokens: int, stop: str) -> str:
        """Let the policy speak until the single token `stop`, or max_tokens; returns the decoded text."""
        stop_ids = tuple(self.agent.tokenizer.encode(stop, add_special_tokens=False))
        if len(stop_ids) != 1:
            raise ValueError(
                f"stop {stop!r} is {len(stop_ids)} tokens for role {self.agent.role}, expected 1"
            )
        ids = await self.sample_ids(SamplingParams(max_tokens, self.agent.temperature, stop_ids))
        text = self.agent.tokenizer.decode(ids)
        self.drift += self.agent.tokenizer.encode(text, add_special_tokens=False) != ids
        return text

    async def sample_ids(self, params: SamplingParams) -> list[int]:
        """As sample(), in token ids. The noise is a function of (seed, rollout, role, invocation, turn)."""
        self.drift += self._ids[: len(self._said)] != self._said
        out = await self.agent.engine.generate(
            self._ids, params, seed=mix(self._seed, self._turn), session=self._session
        )
        self._turn += 1
        ids = [int(i) for i in out.token_ids]
        self._ids.extend(ids)
        self._mask.extend([1] * len(ids))
        self._logprobs.extend(float(x) for x in out.logprobs)
        self._versions.extend(int(v) for v in out.versions)
        self._said = list(self._ids)
        return ids

    def close(self, **scores: float) -> None:
        """End the trajectory with its own reward parts, each in [0, 1]."""
        for name, value in scores.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"score {name}={value} of {self._session} is outside [0, 1]")
        self.scores = scores
        self.agent.engine.release(self._session)

    def trajectory(self) -> Trajectory:
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
        """The ids that begin() would append, to see whether the conversation has room for them. What follows is
        written as a continuation of these messages, and with these tools."""
        self._opening = self.form.open(messages, tools, calls=calls)
        return self._opening.ids

    async def reply(self, max_tokens: int) -> str:
        """Let the policy speak until its turn ends, or max_tokens; what it said, without the end token."""
        params = SamplingParams(max_tokens, self.conversation.agent.temperature, self.form.stop_ids)
        return self.form.text(await self.conversation.sample_ids(params))

    def observe(self, role: str, content: str, calls: Sequence[Mapping[str, object]] | None = None) -> None:
        """Another's message after the policy's turn, which is closed here if it ran into max_tokens. calls: the tool
        calls of that turn, for templates that write of them in a tool's result. Raises as ChatFormat.extend."""
        self.conversation.append_ids(self.observation(role, content, calls))

    def observation(
        self, role: str, content: str, calls: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """The ids that observe() would append, to see whether the conversation has room for them."""
        return self.observations([{"role": role, "content": content}], calls)

    def observations(
        self, messages: Sequence[Message], calls: Sequence[Mapping[str, object]] | None = None
    ) -> list[int]:
        """As observation(), of several messages at once, e.g. the results of parallel tool calls."""
        last = self.conversation.last_sampled()
        return self.form.extend(messages, last=last, calls=calls, opening=self._opening)


class Episode:
    """The conversations of one rollout: one of the main agent, any number of each sub-agent role."""

    def __init__(self, query: str, rollout: int, agents: Mapping[str, Agent], seed: int) -> None:
        self.query, self.rollout, self.agents = query, rollout, agents
        self._seed = mix(seed, rollout)
        self._open: dict[str, list[Conversation]] = {role: [] for role in agents}
        self._opened_at: dict[str, list[int]] = {role: [] for role in agents if role != MAIN}

    def open(self, role: str) -> Conversation:
        """Start the next conversation of `role`."""
        if role not in self._open:
            raise ValueError(f"unknown role {role!r}; this run has {sorted(self._open)}")
        mine = self._open[role]
        if role == MAIN and mine:
            raise ValueError("a rollout has one main trajectory; it is already open")
        seed = mix(self._seed, (sorted(self._open).index(role) << 16) | len(mine))
        if role != MAIN:
            self._opened_at[role].append(sum(len(main) for main in self._open[MAIN]))
        mine.append(self.conversation(self.agents[role], len(mine), seed))
        return mine[-1]

    def conversation(self, agent: Agent, invocation: int, seed: int) -> Conversation:
        """Make a conversation for open(); a subclass may make one that is watched."""
        return Conversation(agent, self.query, self.rollout, invocation, seed)

    def abandon(self) -> None:
        """Free what the engines hold for this rollout; nothing of it will be used."""
        for conversations in self._open.values():
            for conversation in conversations:
                conversation.close()

    def drift(self) -> int:
        """Turns whose text does not encode back to the ids that were sampled (must stay 0)."""
        return sum(c.drift for conversations in self._open.values() for c in conversations)

    def finish(self, correct: float, **info: object) -> Rollout:
        """Close the rollout with the main agent's outcome in [0, 1]. info gets `opened_at`: for each sub-agent role
        the main agent's length in tokens when each invocation began."""
        if not 0.0 <= correct <= 1.0:
            raise ValueError(f"correct={correct} of {self.query}/{self.rollout} is outside [0, 1]")
        (main,) = self._open[MAIN]
        subs = {r: [c.trajectory() for c in cs] for r, cs in self._open.items() if r != MAIN}
        return Rollout(
            self.query, self.rollout, main.trajectory(), subs, correct, info | {"opened_at": self._opened_at}
        )


def mix(seed: int, salt: int) -> int:
    """A 64-bit seed derived from (seed, salt) by one Philox block."""
    words = philox4x32_10(
        [salt & 0xFFFFFFFF, (salt >> 32) & 0xFFFFFFFF, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    )
    return int(words[0]) | (int(words[1]) << 32)
