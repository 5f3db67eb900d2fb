"""A task whose agents are played by a program as it is: it only gets another base URL.

    class MyTask(HarnessTask):
        async def run(self, question, base_url):
            return await my_team(question.text, base_url, base_url.api_key)

        def score(self, question, answer):
            return float(answer == question.answer)

    question -> play() opens the rollout's base URL -> run(), a command or a program elsewhere -> its answer
             -> score() -> every conversation is closed with its scores -> Rollout

run() may be a coroutine function, which belongs to its rollout like everything that it starts, or an ordinary function,
which runs in a thread of its own. A thread cannot be ended: what it asks after its rollout is refused. What an engine
fails at decides, whatever the program makes of its 503: it is ended, and the rollout is played again.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from pydantic import ValidationError

from mgrpo.addresses import is_loopback
from mgrpo.benchmarks.question_file import QuestionFile
from mgrpo.config.settings import first_problem
from mgrpo.environments import attempt
from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question, QuestionSource, Split, Task
from mgrpo.environments.tools import in_thread
from mgrpo.errors import ConfigError, InfrastructureError, RolloutError
from mgrpo.gateway.access import Access
from mgrpo.gateway.command import Command, question_json, run_command
from mgrpo.gateway.forms import Forms
from mgrpo.gateway.harness_options import REPORTED, HarnessOptions, HarnessScoring, read_options
from mgrpo.gateway.rollout import GatewayRollout
from mgrpo.gateway.scores import Answer, Score, merged_scores
from mgrpo.gateway.serving import ClaimOptions, Served, hold
from mgrpo.scoring.judge import Judge, JudgeConfig
from mgrpo.scoring.scorer import Scorer
from mgrpo.services import outage
from mgrpo.types import MAIN, Rollout

__all__ = ["Access", "Answer", "HarnessOptions", "HarnessTask", "Score"]


class HarnessTask(Task):
    """See the module's docstring. A class of one's own has run(), unless options name a command or say `remote`, and
    score(), unless options.score says how; question() and questions() where options.questions does not say where from.
    """

    roles: tuple[str, ...] = (MAIN, "sub")
    chat = True
    Options: ClassVar[type[HarnessOptions]] = HarnessOptions
    """The class of its options: one with further keys derives from HarnessOptions."""

    def __init__(
        self, options: Mapping[str, object] = MappingProxyType({}), roles: Sequence[str] | None = None
    ) -> None:
        """Starts nothing. Raises ValueError and ConfigError for options that do not fit the class or each other."""
        self.options = read_options(self.Options, dict(options))
        self.roles = tuple(self.roles if roles is None else roles)
        self.scores = self._declared()
        self._check_ways()
        self._source = self._make_source()
        self._scorer = self._make_scorer()
        self._command = _command_of(self.options)
        self._forms = Forms(self.options.gateway, self.options.template)
        self._held: Served | None = None

    # -- what a class of one's own says ----------------------------------------------------------------------------

    def run(self, question: Question, base_url: Access) -> object:
        """Play one rollout against `base_url`: a text, with api_key, anthropic_url and more. Returns the answer, any
        JSON value, or an Answer. A coroutine function, or an ordinary one. What it raises fails the rollout, as in
        play() of any task."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")

    def score(self, question: Question, answer: object) -> float | Score | Awaitable[float | Score]:
        """What an answer is worth, 0..1; a Score gives the scores of trajectories too. May be a coroutine function. The
        default is what options.score says."""
        raise NotImplementedError(f"{type(self).__name__} has no score()")

    def make_questions(self) -> QuestionSource:
        """Where questions come from, unless the class has question() and questions()."""
        return QuestionFile.of(self.options.questions)

    # -- questions -------------------------------------------------------------------------------------------------

    def question(self, index: int, seed: int) -> Question:
        assert self._source is not None
        return self._source.question(index, seed)

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        assert self._source is not None
        return self._source.questions(split, n, seed)

    # -- rollouts --------------------------------------------------------------------------------------------------

    async def play(self, question: Question, episode: Episode) -> Rollout:
        held = self._hold()
        await held.started()
        rollout = GatewayRollout(episode, self.options.gateway, self._forms)
        access = Access(held.gateway.open(rollout), rollout.token)
        try:
            async with rollout.decides():
                said = await self._said(held, rollout, question, access)
                await rollout.settle()  # what it asked and did not wait for
        finally:
            rollout.end()
            held.gateway.close_rollout(rollout)
        return await self._finish(episode, rollout, question, said)

    async def _said(
        self, held: Served, rollout: GatewayRollout, question: Question, access: Access
    ) -> Answer:
        """What the harness answers."""
        if held.claims is not None:
            return await held.claims.play(rollout.id, question, access)
        if self._command is not None:
            async with self._place():
                environment = self._command.environment(access.environment())
                return await run_command(self._command, question_json(question), environment)
        if inspect.iscoroutinefunction(self.run):
            answer: object = await _ended(self.run(question, access))
        else:
            answer = await in_thread("harness", partial(self.run, question, access))
            answer = await _ended(answer) if inspect.isawaitable(answer) else answer
        return answer if isinstance(answer, Answer) else Answer(answer)

    async def _finish(
        self, episode: Episode, rollout: GatewayRollout, question: Question, said: Answer
    ) -> Rollout:
        """Score it, and close every conversation with its scores."""
        conversations = rollout.conversations()
        if (MAIN, 0) not in conversations:
            raise RolloutError(
                f"{episode.query}/{episode.rollout}: the harness ended, and no request had the model {MAIN!r}; agents "
                f"that spoke: {', '.join(sorted({role for role, _ in conversations})) or 'none'}"
            )
        outcome = await self._score(episode, question, said)
        scores = merged_scores(conversations, self.scores, rollout.rewards(), said.scores, outcome.scores)
        for place, conversation in conversations.items():
            conversation.close(**scores[place])
        rollout.arrange()
        for name, count in rollout.counts.items():
            episode.metric(f"gateway_{name}", count)
        info = {
            "answer": said.value,
            "gold": list(question.gold),
            "question_id": question.id,
            "tags": dict(question.tags),
        }
        if taken := sorted({*info, "correct", "opened_at"}.intersection(outcome.info)):
            raise RolloutError(
                f"the info of a Score has {taken[0]!r}, which the rollout's record has of itself"
            )
        return episode.finish(outcome.correct, **info, **outcome.info)

    async def _score(self, episode: Episode, question: Question, said: Answer) -> Score:
        if said.correct is not None and (self._scorer is not None or _is_own(self, "score")):
            scorer = f"{type(self).__name__}.score()" if self._scorer is None else "task.options.score"
            raise RolloutError(
                f"{episode.query}/{episode.rollout}: the harness gave `correct` = {said.correct:g} with its answer, "
                f'and {scorer} decides: leave it out, or have score = {{ rule = "{REPORTED}" }} and no score()'
            )
        if self._scorer is not None:
            answer = said.value if isinstance(said.value, str | None) else json_text(said.value)
            found = await self._scorer.score(question, answer, f"{episode.query}/{episode.rollout}")
            return Score(found.correct, info={"verdict": self._scorer.record(found)})
        if not _is_own(self, "score"):
            if said.correct is None:
                raise RolloutError(
                    f"{episode.query}/{episode.rollout}: the harness gave no `correct` with its answer, and "
                    f'task.options.score.rule is "{REPORTED}"'
                )
            return Score(said.correct)
        value = self.score(question, said.value)
        given = await value if inspect.isawaitable(value) else value
        return given if isinstance(given, Score) else Score(given)

    # -- a run -----------------------------------------------------------------------------------------------------

    async def preflight(self) -> None:
        """The server listens, the command is there, the judge agrees with known verdicts. Raises ConfigError."""
        await self._hold().started()
        if self._command is not None:
            environment = self._command.environment({})
            program, folder = self._command.words[0], Path(self._command.folder or ".")
            if not folder.is_dir():
                raise ConfigError(f"task.options.folder {str(folder)!r}: no such folder")
            named = str(folder / program) if "/" in program else program
            if shutil.which(named, path=environment.get("PATH")) is None:
                raise ConfigError(f"task.options.command: there is no program {program!r}")
        if self._scorer is not None:
            await self._scorer.calibrate()

    async def close(self) -> None:
        """Close the server, unless another task of this process still needs it. Idempotent."""
        held, self._held = self._held, None
        if held is not None and not held.loop.is_closed():
            await held.release()
        if self._scorer is not None:
            await self._scorer.close()

    def digests(self) -> Mapping[str, str]:
        return {} if self._scorer is None else {"scorer": self._scorer.digest}

    # -- making it -------------------------------------------------------------------------------------------------

    def _hold(self) -> Served:
        """The server on the running loop."""
        if self._held is None or self._held.loop is not asyncio.get_running_loop():
            self._held = hold(self.options.gateway, self._claiming())
            self._places = asyncio.Semaphore(self.options.processes)
        return self._held

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """One of the places for processes; a rollout that waits for one does not age."""
        places = self._places
        with outage.waiting():
            await places.acquire()
        try:
            yield
        finally:
            places.release()

    def _claiming(self) -> ClaimOptions | None:
        """How rollouts are claimed. Raises ConfigError for a key that is missing."""
        options = self.options
        if not options.remote:
            return None
        key = os.environ.get(options.key_env, "").strip() if options.key_env else None
        if options.key_env and not key:
            raise ConfigError(f"task.options.key_env: the environment variable {options.key_env} is not set")
        return ClaimOptions(key, options.max_outage, options.alive_seconds)

    def _declared(self) -> Mapping[str, frozenset[str]]:
        named = {role: frozenset(self.scores.get(role, ())) for role in self.roles}
        if unknown := sorted(set(self.options.scores) - set(self.roles)):
            raise ValueError(f"options.scores: unknown role {unknown[0]!r}; this run has {list(self.roles)}")
        return named | {role: frozenset(names) for role, names in self.options.scores.items()}

    def _check_ways(self) -> None:
        options, own = self.options, _is_own(self, "run")
        if own and (options.command or options.remote):
            way = "command" if options.command else "remote"
            raise ValueError(f"options.{way}: {type(self).__name__} has a run() of its own")
        if not (own or options.command or options.remote):
            raise ValueError("options need command = [...] or remote = true, or the class a run()")
        if options.remote and options.key_env is None and not is_loopback(options.gateway.host):
            raise ValueError(
                f"options.gateway.host {options.gateway.host!r} is not loopback: options.key_env must name the "
                "environment variable of the key with which programs claim rollouts"
            )

    def _make_source(self) -> QuestionSource | None:
        own = [name for name in ("question", "questions") if _is_own(self, name)]
        if len(own) == 2:
            if self.options.questions:
                raise ValueError(f"options.questions: {type(self).__name__} has questions of its own")
            return None
        return self.make_questions()

    def _make_scorer(self) -> Scorer | None:
        """None where the class scores, or the harness."""
        options = self.options.score
        if _is_own(self, "score"):
            if "score" in self.options.model_fields_set:
                raise ValueError(f"options.score: {type(self).__name__} has a score() of its own")
            return None
        return None if options.rule == REPORTED else Scorer(options.rule, _judge_of(options))


async def _ended(program: Awaitable[object]) -> object:
    """What it returns. A task of its own, so that one that goes on although it is cancelled holds nobody up: raises
    InfrastructureError after attempt.PATIENCE seconds."""

    async def guarded() -> tuple[object, SystemExit | None]:
        try:
            return await program, None
        except SystemExit as error:  # in a task it would end the loop
            return None, error

    task = asyncio.ensure_future(guarded())
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel("the rollout has ended")
        await asyncio.wait({task}, timeout=attempt.PATIENCE)
        if not task.done():
            raise InfrastructureError(
                f"run() did not end within {attempt.PATIENCE:g} s of its cancellation"
            ) from None
        if not task.cancelled():
            task.exception()  # retrieved: what ended it is what counts
        raise
    answer, left = task.result()
    if left is not None:
        raise left
    return answer


def json_text(value: object) -> str:
    """An answer that is no text, for rules and judges: its JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise RolloutError(f"the answer is no JSON value: {error}") from None


def _is_own(task: HarnessTask, name: str) -> bool:
    """Whether the class of `task` has this method itself."""
    return getattr(type(task), name) is not getattr(HarnessTask, name)


def _command_of(options: HarnessOptions) -> Command | None:
    if not options.command:
        return None
    return Command(tuple(options.command), options.folder, tuple(options.env), int(options.output_mb * 1e6))


def _judge_of(options: HarnessScoring) -> Judge | None:
    if options.judge is None:
        return None
    try:
        return Judge(JudgeConfig.model_validate(dict(options.judge)))
    except ValidationError as error:
        raise ValueError(first_problem(error, "options.score.judge", got=False)) from None
