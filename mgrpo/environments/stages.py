"""A curriculum: the same task with other options from stage to stage ([[task.stages]]).

    group number -> step that claims it -> stage -> the Task with that stage's options -> question, play

The pipeline sees one Task. Which stage a question is of follows from the number of its group and nothing else, and the
question carries it to play(): a resumed run, several workers and a replay ask and play the same. What belongs to no
group is of one stage always: the policies that RL starts from (build_policy, demonstrations, start validation) of the
first, every evaluation, control and claim of the last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from mgrpo.config.run import RunConfig
from mgrpo.environments.comparison import Claim, Figures
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.loader import load_task, load_tasks
from mgrpo.environments.task import Question, Split, StartReport, Task
from mgrpo.errors import ConfigError
from mgrpo.types import Int32, Rollout, UInt8


@dataclass(frozen=True, slots=True)
class StagedQuestion(Question):
    """A training question. stage: number of its stage; asked: the question as that stage's task gave it."""

    stage: int = field(kw_only=True)
    asked: Question = field(kw_only=True)


class StagedTask(Task):
    """The tasks of a curriculum as one."""

    def __init__(self, tasks: Sequence[Task], stage_of: Callable[[int], int]) -> None:
        """tasks: of each stage; stages with equal options share one. stage_of: number of a group -> number of its
        stage. Raises ValueError where the stages need chat templates of different kinds: models are checked once."""
        self.stages = tuple(tasks)
        self._stage_of = stage_of
        first, last = self.stages[0], self.stages[-1]
        for number, task in enumerate(self.stages):
            for name in ("roles", "chat", "chat_use"):
                if getattr(task, name) != getattr(first, name):
                    raise ValueError(f"{name} of stage {number + 1} is not that of stage 1")
        self.roles, self.chat, self.chat_use = first.roles, first.chat, first.chat_use
        self.scores, self.controls, self.evaluation_sets = last.scores, last.controls, last.evaluation_sets

    # -- training --------------------------------------------------------------------------------------------------

    def question(self, index: int, seed: int) -> Question:
        stage = self._stage_of(index)
        asked: object = self.stages[stage].question(index, seed)
        if not isinstance(asked, Question):  # the caller names what it is
            return asked  # type: ignore[return-value]
        same = {f.name: getattr(asked, f.name) for f in fields(Question)}
        return StagedQuestion(**same, stage=stage, asked=asked)

    async def play(self, question: Question, episode: Episode) -> Rollout:
        """By the task of the question's stage; a question that carries none is of the last."""
        if isinstance(question, StagedQuestion):
            return await self.stages[question.stage].play(question.asked, episode)
        return await self.stages[-1].play(question, episode)

    # -- the last stage's ------------------------------------------------------------------------------------------

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return self.stages[-1].questions(split, n, seed)

    def evaluation_set(self, name: str, n: int | None = None) -> Sequence[Question]:
        return self.stages[-1].evaluation_set(name, n)

    def digests(self) -> Mapping[str, str]:
        return self.stages[-1].digests()

    def single_agent(self, options: Mapping[str, object]) -> Mapping[str, object] | None:
        return self.stages[-1].single_agent(options)

    def claims(self, figures: Figures) -> Sequence[Claim]:
        return self.stages[-1].claims(figures)

    # -- the first stage's -----------------------------------------------------------------------------------------

    def build_policy(self, role: str, seed: int, path: str) -> None:
        self.stages[0].build_policy(role, seed, path)

    def demo_batch(self, role: str, step: int, size: int, seed: int) -> Sequence[tuple[Int32, UInt8]]:
        return self.stages[0].demo_batch(role, step, size, seed)

    def sft_lr(self, role: str) -> float:
        return self.stages[0].sft_lr(role)

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        return await self.stages[0].validate_start(agents, n, seed)

    # -- of all ----------------------------------------------------------------------------------------------------

    async def preflight(self) -> None:
        for task in self._distinct():
            await task.preflight()

    async def close(self) -> None:
        """Close every one, whatever another raises."""
        errors = []
        for task in self._distinct():
            try:
                await task.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _distinct(self) -> list[Task]:
        return list({id(task): task for task in self.stages}.values())


def load_staged(config: RunConfig) -> Task:
    """The task of a run, of all its stages where it has some. Raises ConfigError as load_task does, naming the
    stage."""
    stages = config.task.stages
    if not stages:
        return load_task(config.task, config.roles)
    options = [config.task.stage_options(number) for number in range(len(stages))]
    keys = [json.dumps(o, sort_keys=True) for o in options]
    distinct = {key: number for number, key in reversed(list(enumerate(keys)))}  # of the first stage with it
    made = load_tasks(
        config.task,
        config.roles,
        {f"task.stages.{n}: ": options[n] for n in sorted(distinct.values())},
    )
    if len(made) == 1:
        return made[0]
    by_key = dict(zip(sorted(distinct, key=distinct.__getitem__), made, strict=True))
    try:
        return StagedTask([by_key[key] for key in keys], config.stage_of)
    except ValueError as error:
        raise ConfigError(f"task.stages: {error}") from None


def tasks_of_stages(task: Task, n: int) -> list[Task]:
    """The task of each of n stages."""
    return list(task.stages) if isinstance(task, StagedTask) else [task] * n
