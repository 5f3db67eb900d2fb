"""The named evaluation sets of a run ([[eval.sets]]): their questions, when each is due, and what comes of it.

    avg      mean over the questions of the mean outcome of their rollouts
    stderr   sqrt(sum (m_q - avg)^2 / (Q - 1) / Q) over the Q questions, m_q the mean of question q: the repeats of one
             question are not independent of each other, so they count as one measurement

A failed rollout is counted beside and in no mean; a question none of whose rollouts ended is left out of Q.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgrpo.config.evaluation import OWN, EvalSetConfig
from mgrpo.environments.episode import Agent, mix
from mgrpo.environments.task import Question, Task
from mgrpo.errors import ConfigError, InfrastructureError
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, all_failed, play_all
from mgrpo.plugins import errors_named
from mgrpo.types import Rollout

MAX_VALUES = 24
"""Values of one tag: a tag with more is no level or kind, but a name of its own for each question."""
_OTHER = re.compile(r"[^A-Za-z0-9_.]+")


@dataclass(slots=True)
class EvalSet:
    """One set. played: steps whose policies have played it."""

    config: EvalSetConfig
    questions: Sequence[Question]
    played: set[int] = field(default_factory=set)

    def due(self, step: int) -> bool:
        """Whether the policies of this step are to play it before newer ones come."""
        last = max((s for s in self.played if s <= step), default=0)
        return step > 0 and step // self.config.every > last // self.config.every


@dataclass(frozen=True, slots=True)
class SetResult:
    """avg and stderr as above; stderr is None for fewer than two questions. failed: rollouts. tags: "<tag>-<value>" ->
    avg of the questions with it."""

    avg: float
    stderr: float | None
    failed: int
    tags: Mapping[str, float]


def read_set(number: int, config: EvalSetConfig, task: Task) -> EvalSet:
    """Set number `number` of eval.sets with its questions. Raises ConfigError naming the set where they cannot be
    read, or there are none."""
    where = f"eval.sets.{number} ({config.name})"
    with errors_named(where):
        try:
            if config.source == OWN:
                questions = task.evaluation_set(config.name, config.n)
            else:
                from mgrpo.benchmarks import read_questions

                questions = read_questions(config.source, Path(config.path or ""), **config.options)
        except (ConfigError, ValueError, OSError) as error:
            raise ConfigError(f"{where}: {error}") from error
    if not questions:
        raise ConfigError(f"{where}: {config.path or 'the task'} holds no question")
    return EvalSet(config, list(questions)[: config.n])


async def play_set(
    task: Task,
    played: EvalSet,
    agents: Mapping[str, Agent],
    *,
    seed: int,
    seen: Callable[[int, RolloutResult], None],
    accept: Callable[[Rollout], object] | None = None,
    deadline: float | None = None,
) -> SetResult:
    """Play every question of the set. seen: called with the number of its question as each rollout ends. accept,
    deadline: as in play(). Raises InfrastructureError where no rollout succeeded."""
    config, failure = played.config, ""
    if config.greedy:
        agents = {role: replace(agent, temperature=0.0) for role, agent in agents.items()}
    outcomes: list[list[float]] = [[] for _ in played.questions]
    failed = 0
    numbers = {f"eval/{config.name}/{i}": i for i in range(len(played.questions))}
    requests = [
        RolloutRequest(query, played.questions[i], repeat)
        for query, i in numbers.items()
        for repeat in range(config.repeats)
    ]

    async def count(result: RolloutResult) -> None:
        nonlocal failed, failure
        number = numbers[result.request.query]
        seen(number, result)
        if result.rollout is None:
            failed, failure = failed + 1, result.failure
        else:
            outcomes[number].append(result.rollout.correct)

    def seed_of(request: RolloutRequest) -> int:
        return mix(seed, numbers[request.query])

    await play_all(task, requests, agents, seed_of, count, accept, deadline)
    if failed == len(requests):
        raise InfrastructureError(all_failed(failed, f"evaluation set {config.name!r}", failure))
    return result_of(played.questions, outcomes, failed)


def result_of(questions: Sequence[Question], outcomes: Sequence[Sequence[float]], failed: int) -> SetResult:
    """outcomes: of the rollouts of each question that did not fail, at least one among all."""
    means = {n: math.fsum(o) / len(o) for n, o in enumerate(outcomes) if o}
    avg, stderr = _mean_and_error(list(means.values()))
    groups: dict[str, dict[str, list[float]]] = {}
    for number, mean in means.items():
        for tag, value in questions[number].tags.items():
            groups.setdefault(_word(tag), {}).setdefault(_word(value), []).append(mean)
    tags = {
        f"{tag}-{value}": _mean_and_error(found)[0]
        for tag, values in sorted(groups.items())
        if len(values) <= MAX_VALUES
        for value, found in sorted(values.items())
    }
    return SetResult(avg, stderr, failed, tags)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _word(text: object) -> str:
    """A tag or its value as a part of a metric's name."""
    return _OTHER.sub("_", str(text)).strip("_") or "none"
