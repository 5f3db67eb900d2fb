"""What tasks/research counts as right: the answer by rule and judge, a sub-agent's report by its expert score.

expert = "path"    the question's info names the values on the way to its answer: info["path"], a list of {"value": ...}
                   tables. A report is scored by those of them that it gives and that stand on a page which the
                   sub-agent opened (mgrpo/scoring/expert.py). A question without a path is graded by expert_judge,
                   where there is one.
expert = "judge"   a model grades task and report by a rubric; it sees no gold answer.
neither            sub-agents have no score `expert`, and a reward that pays for it is refused.

No answer and no report are worth 0 without a call. A judge that fails raises InfrastructureError, never a 0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic import ValidationError

from mgrpo.config.settings import Settings, first_problem
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError
from mgrpo.scoring.expert import Expert, ExpertConfig, path_score
from mgrpo.scoring.judge import Judge, JudgeConfig
from mgrpo.scoring.scorer import Outcome, Scorer
from mgrpo.tasks.research.options import ScoreOptions

if TYPE_CHECKING:
    from mgrpo.services.cassette import Cassette

PATH = "path"
"""The key of a question's info with its gold path."""
OF_JUDGE = frozenset({"template", "calibration", "calibration_file"})
"""Settings of score.judge that are about answers: an expert does not take them over."""


S = TypeVar("S", bound=Settings)


class Worked(Protocol):
    """What an agent has done: see play.py, Ended."""

    @property
    def task(self) -> str: ...

    @property
    def said(self) -> str | None: ...

    @property
    def pages(self) -> Sequence[str]: ...


class Scores:
    """Scores the agents of rollouts. Many rollouts of one event loop share it."""

    def __init__(self, options: ScoreOptions, cassette: Cassette | None = None) -> None:
        """Opens no connection. Raises ValueError and ConfigError for settings that do not fit."""
        self._options = options
        judged = _read(JudgeConfig, "judge", options.judge)
        self._judge = None if judged is None else Judge(judged, cassette)
        self._scorer = Scorer(options.rule, self._judge)
        self._expert = self._make_expert(cassette)

    def _make_expert(self, cassette: Cassette | None) -> Expert | None:
        """The model that grades reports, where one may be asked."""
        options = self._options
        if options.expert is None and options.expert_judge is not None:
            raise ValueError("options.score.expert_judge has no effect without score.expert")
        of_judge = {k: v for k, v in (options.judge or {}).items() if k not in OF_JUDGE}
        settings = options.expert_judge or (of_judge if options.expert == "judge" else None)
        if options.expert == "judge" and not settings:
            raise ValueError('options.score.expert "judge" needs score.expert_judge, or score.judge')
        config = _read(ExpertConfig, "expert_judge", settings)
        return None if config is None else Expert(config, cassette)

    @property
    def has_expert(self) -> bool:
        """Whether sub-agents have a score of their own."""
        return self._options.expert is not None

    async def of_rollout(
        self, question: Question, main: Worked, subs: Sequence[Worked], occurrence: str
    ) -> tuple[Outcome, list[float | None]]:
        """The rollout's outcome, and the expert score of each sub-agent (None: there is none). occurrence: names the
        rollout. Raises InfrastructureError where a judge fails, ConfigError for a question that nothing can grade
        reports of."""
        async with asyncio.TaskGroup() as group:
            outcome = group.create_task(self.outcome(question, main.said, occurrence))
            experts = [
                group.create_task(self.expert(question, sub, f"{occurrence}/{number}"))
                for number, sub in enumerate(subs)
            ]
        return outcome.result(), [expert.result() for expert in experts]

    async def outcome(self, question: Question, answer: str | None, occurrence: str) -> Outcome:
        """Of an answer."""
        return await self._scorer.score(question, answer, occurrence)

    def record(self, outcome: Outcome) -> dict[str, object]:
        """What the record keeps of an outcome."""
        return self._scorer.record(outcome)

    async def expert(self, question: Question, sub: Worked, occurrence: str) -> float | None:
        """Of a report."""
        if not self.has_expert:
            return None
        if sub.said is None:
            return 0.0
        if self._options.expert == "path" and (path := gold_path(question)):
            return of_path(sub.task, sub.said, path, sub.pages)
        if self._expert is None:
            raise ConfigError(
                f"question {question.id or question.text[:80]!r} has no gold path (info[{PATH!r}]) that score.expert = "
                '"path" could use; set score.expert_judge, or leave score.expert out'
            )
        return await self._expert.score(sub.task, sub.said, occurrence)

    async def preflight(self) -> None:
        """Judges agree with what is known. Raises ConfigError."""
        for judge in (self._judge, self._expert):
            if judge is not None:
                await judge.calibrate()

    async def close(self) -> None:
        """Close the judges' connections. Idempotent."""
        for judge in (self._judge, self._expert):
            if judge is not None:
                await judge.close()


def gold_path(question: Question) -> list[tuple[str, ...]]:
    """The values on the way to the answer, each in all its spellings: of every table of info["path"] its `value` and
    `names`. Empty: the question has none. Raises ConfigError for a path of another shape."""
    steps = question.info.get(PATH, ())
    found = []
    listed = isinstance(steps, list | tuple)
    for step in steps if isinstance(steps, list | tuple) else [steps]:
        table: Mapping[str, object] = step if listed and isinstance(step, Mapping) else {}
        value, names = table.get("value"), table.get("names")
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"question {question.id or question.text[:80]!r}: info[{PATH!r}] should be a list of tables with a "
                f"text `value`, got {step!r:.100}"
            )
        others = names if isinstance(names, list | tuple) else ()
        found.append((value, *(str(name) for name in others if name != value)))
    return found


def of_path(task: str, report: str, path: Sequence[Sequence[str]], pages: Sequence[str]) -> float:
    """What a report is worth by a gold path: the best step of it, since a task is one step of the way. A value that the
    task names is what was known before, so it does not count."""
    best = 0.0
    for spellings in path:
        if not path_score(task, [spellings], [task]):
            best = max(best, path_score(report, [spellings], pages))
    return best


def _read(kind: type[S], name: str, options: Mapping[str, object] | None) -> S | None:
    if options is None:
        return None
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        raise ValueError(first_problem(error, "options.score", name, got=False)) from None
