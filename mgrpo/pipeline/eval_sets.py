"""The named evaluation sets of a run ([[eval.sets]]): their questions, when each is due, and what comes of it.

The figures are those of `mgrpo bench` (mgrpo/benchmarks/statistics.py): avg is the mean over the questions of the mean
outcome of their rollouts, its error is over the questions, and a failed rollout is counted beside and in no mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mgrpo.benchmarks.statistics import QuestionScores, by_tag, score_set
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
    """stderr is None for fewer than two questions. failed: rollouts. tags: "<tag>-<value>" ->
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
    step: int,
    seed: int,
    seen: Callable[[int, RolloutResult], None],
    accept: Callable[[Rollout], object] | None = None,
    deadline: float | None = None,
) -> SetResult:
    """Play every question of the set with the policies of `step`. seen: called with the number of its question as each
    rollout ends. accept, deadline: as in play(). Raises InfrastructureError where no rollout succeeded."""
    config, failure = played.config, ""
    if config.greedy:
        agents = {role: replace(agent, temperature=0.0) for role, agent in agents.items()}
    scores = [QuestionScores(question.id, _words(question.tags)) for question in played.questions]
    numbers = {f"eval/{config.name}/{step}/{i}": i for i in range(len(scores))}
    requests = [
        RolloutRequest(query, played.questions[i], repeat)
        for query, i in numbers.items()
        for repeat in range(config.repeats)
    ]

    async def count(result: RolloutResult) -> None:
        nonlocal failure
        number, repeat = numbers[result.request.query], result.request.rollout
        seen(number, result)
        if result.rollout is None:
            scores[number].failed[repeat], failure = str(result.kind), result.failure
        else:
            scores[number].scores[repeat] = result.rollout.correct

    def seed_of(request: RolloutRequest) -> int:
        return mix(seed, numbers[request.query])

    await play_all(task, requests, agents, seed_of, count, accept, deadline)
    if not any(question.scores for question in scores):
        raise InfrastructureError(all_failed(len(requests), f"evaluation set {config.name!r}", failure))
    return result_of(scores, config.repeats)


def result_of(questions: Sequence[QuestionScores], repeats: int) -> SetResult:
    """Of `repeats` rollouts of each question, at least one of which did not fail. tags: as _words() makes them."""
    figures = score_set(questions, repeats)
    tags = {
        f"{tag}-{value}": found.mean
        for tag, values in by_tag(questions, repeats).items()
        if len(values) <= MAX_VALUES
        for value, found in values.items()
        if found.scored
    }
    stderr = None if math.isnan(figures.stderr) else figures.stderr
    return SetResult(figures.mean, stderr, sum(figures.failed.values()), tags)


def _words(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as parts of a metric's name."""
    return {_word(tag): _word(value) for tag, value in tags.items()}


def _word(text: object) -> str:
    return _OTHER.sub("_", str(text)).strip("_") or "none"
