"""An engine without weights for tests of rollouts, and a task whose play() is given."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.task import Question, Split, Task
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, play
from mgrpo.types import Rollout

REQUEST = RolloutRequest("q", Question("q", "a"), 0)


class Letters:
    """One token a character."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


class SlowEngine(Engine):
    """Says "x" until max_tokens after `turns` turns of the event loop. Like the real ones it refuses a second request
    of a session, and it knows which sessions it was told to forget."""

    def __init__(self, turns: int = 3) -> None:
        self.turns = turns
        self.talking: set[str] = set()
        self.held: set[str] = set()
        self.begun: list[str] = []

    @property
    def version(self) -> int:
        return 0

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        assert session is not None
        if session in self.talking:
            raise ValueError(f"session {session!r} already has a request running")
        self.talking.add(session)
        self.held.add(session)
        self.begun.append(session)
        try:
            for _ in range(self.turns):
                await asyncio.sleep(0)
        finally:
            self.talking.discard(session)
        n = params.max_tokens
        return Generation(
            np.full(n, ord("x"), np.int32), np.full(n, -1, np.float32), np.zeros(n, np.int32), "length"
        )

    async def load(self, path_or_state: object, version: int) -> None:
        raise AssertionError("it has no weights")

    def release(self, session: str) -> None:
        assert session not in self.talking, "released while its call is under way"
        self.held.discard(session)


class GivenTask(Task):
    """Plays what it is given."""

    roles = ("main", "sub")

    def __init__(self, script: Callable[[Episode], Awaitable[object]]) -> None:
        self._script = script

    def question(self, index: int, seed: int) -> Question:
        return REQUEST.question

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [REQUEST.question] * n

    async def play(self, question: Question, episode: Episode) -> Rollout:
        return await self._script(episode)  # type: ignore[return-value]


def team(engine: Engine, max_length: int = 64) -> dict[str, Agent]:
    return {role: Agent(role, engine, Letters(), 1.0, max_length) for role in ("main", "sub")}


async def one_turn(episode: Episode, role: str, tokens: int = 2) -> None:
    """A whole conversation of `role`."""
    conversation = episode.open(role)
    conversation.append("hi")
    await conversation.sample(tokens, stop=".")
    conversation.close(format=1.0)


def played(
    script: Callable[[Episode], Awaitable[object]],
    engine: Engine | None = None,
    accept: Callable[[Rollout], object] | None = None,
    deadline: float | None = None,
) -> RolloutResult:
    """What comes of one rollout of `script`."""
    agents = team(engine or SlowEngine())
    return asyncio.run(asyncio.wait_for(play(GivenTask(script), REQUEST, agents, 1, accept, deadline), 60))
