"""Rollouts as coroutines: many at once on one event loop, batched by the engines.

A failure of an engine, tool or judge (InfrastructureError) is tried again with another attempt number and, if it stays,
makes the rollout a failed one: it leaves its group and is never scored. Any other exception is a bug and ends the
worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mgrpo.errors import InfrastructureError
from mgrpo.rollout.episode import Agent, Episode, mix
from mgrpo.rollout.task import Question, Task
from mgrpo.types import Rollout

ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """One rollout to be played: rollout number `rollout` of `question`, known to the store as `query`."""

    query: str
    question: Question
    rollout: int


@dataclass(frozen=True, slots=True)
class Played:
    """What came of an Ask: a rollout, or the reason why there is none."""

    ask: Ask
    attempt: int
    rollout: Rollout | None
    failure: str = ""
    drift: int = 0


async def play(task: Task, ask: Ask, agents: Mapping[str, Agent], seed: int) -> Played:
    """Play one rollout, with up to ATTEMPTS attempts. The seed names the noise: same seed and weights, same rollout."""
    failure = ""
    for attempt in range(ATTEMPTS):
        episode = Episode(ask.query, ask.rollout, agents, mix(seed, attempt))
        try:
            rollout = await task.play(ask.question, episode)
        except InfrastructureError as error:
            episode.abandon()
            failure = str(error)
            continue
        return Played(ask, attempt, rollout, drift=episode.drift())
    return Played(ask, ATTEMPTS - 1, None, failure)


async def play_all(
    task: Task,
    asks: Sequence[Ask],
    agents: Mapping[str, Agent],
    seed: Callable[[Ask], int],
    done: Callable[[Played], Awaitable[None]],
) -> None:
    """Play all rollouts concurrently; `done` is awaited for each as it ends. The first bug cancels the rest."""

    async def one(ask: Ask) -> None:
        await done(await play(task, ask, agents, seed(ask)))

    try:
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                group.create_task(one(ask))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others are the same bug, or the cancellation it caused


@dataclass(slots=True)
class Accuracy:
    """Mean outcome over the questions of an evaluation, and how often each sub-agent role was called."""

    correct: float = 0.0
    n: int = 0
    failed: int = 0
    failure: str = ""  # why the last of the failed did
    calls: dict[str, dict[int, int]] = field(default_factory=dict)  # role -> {d_k: number of rollouts}

    @property
    def mean(self) -> float:
        return self.correct / self.n if self.n else float("nan")


async def evaluate(
    task: Task,
    questions: Sequence[Question],
    agents: Mapping[str, Agent],
    *,
    greedy: bool,
    seed: int,
    seen: Callable[[int, Played], None] | None = None,
) -> Accuracy:
    """One rollout of each question. Failed rollouts are counted beside the mean, not in it. `seen` hears of each
    rollout as it ends, with the number of its question. Raises InfrastructureError where none succeeded."""
    if greedy:
        agents = {role: replace(agent, temperature=0.0) for role, agent in agents.items()}
    result = Accuracy()

    async def count(played: Played) -> None:
        if seen is not None:
            seen(numbers[played.ask.query], played)
        if played.rollout is None:
            result.failed += 1
            result.failure = played.failure
            return
        result.n += 1
        result.correct += played.rollout.correct
        for role, d in played.rollout.d_k().items():
            histogram = result.calls.setdefault(role, {})
            histogram[d] = histogram.get(d, 0) + 1

    asks = [Ask(f"eval/{'greedy' if greedy else 'sampled'}/{i}", q, 0) for i, q in enumerate(questions)]
    numbers = {ask.query: i for i, ask in enumerate(asks)}
    await play_all(task, asks, agents, lambda ask: mix(seed, numbers[ask.query]), count)
    if result.failed and not result.n:
        raise InfrastructureError(all_failed(result.failed, "an evaluation", result.failure))
    return result


def all_failed(n: int, where: str, failure: str) -> str:
    """What to say where nothing was played: something is down, and it is none of the rollouts' doing."""
    return f"all {n} rollouts of {where} failed, the last with: {failure}"
