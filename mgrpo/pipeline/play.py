"""Rollouts as coroutines: many at once on one event loop, batched by the engines.

A failure of an engine, tool or judge (InfrastructureError) is tried again with another attempt number. If it stays, or
if anything else is raised (see failure.py), the rollout is a failed one: it leaves its group, is counted and is never
scored. So is one that takes longer than its deadline, all attempts together. The deadline does not run while a rollout
waits for a service that is down (mgrpo/services/outage.py), which spends no attempt either. What play() starts ends
with its attempt: asyncio tasks that still run are cancelled and awaited.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mgrpo.environments.attempt import Attempt
from mgrpo.environments.episode import Agent, Episode, mix
from mgrpo.environments.failure import Failure, Kind, failure_of
from mgrpo.environments.task import Question, Task
from mgrpo.environments.tools import ToolCalls
from mgrpo.errors import InfrastructureError
from mgrpo.record import spans
from mgrpo.services import outage
from mgrpo.types import Rollout, Trajectory

ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Unasked(Question):
    """A question that the task failed to give: its rollouts fail with the same reason."""

    failure: Failure = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One rollout to be played: rollout number `rollout` of `question`, known to the store as `query`."""

    query: str
    question: Question
    rollout: int


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What came of a RolloutRequest: a rollout, or the reason why there is none."""

    request: RolloutRequest
    attempt: int
    rollout: Rollout | None
    failure: str = ""
    kind: Kind | None = None  # of the failure
    mismatches: int = 0  # turns with a retokenization mismatch
    calls: int = 0  # sub-agents that the last attempt called
    seconds: float = 0.0  # from its start to its end, all attempts together
    tools: Mapping[str, list[float]] = field(
        default_factory=dict
    )  # metrics of its tool calls, all attempts together

    def metrics(self) -> Mapping[str, list[float]]:
        """Full name -> values: the task's own and those of its tools; of a failed rollout, its tools'."""
        return self.tools if self.rollout is None else self.rollout.metrics

    def trajectories(self) -> list[Trajectory]:
        """Those of the rollout; none where there is none."""
        return [] if self.rollout is None else self.rollout.trajectories()


def question_of(task: Task, index: int, seed: int) -> Question:
    """Training question number `index` of `seed`; Unasked where the task raises, or returns something else."""
    try:
        question: object = task.question(index, seed)
        if not isinstance(question, Question):
            raise TypeError(f"question({index}) returned an object of type {type(question).__name__}")
        for name, text in (("text", question.text), ("answer", question.answer)):
            if not isinstance(text, str):
                raise TypeError(
                    f"the {name} of question({index}) is of type {type(text).__name__}, expected str"
                )
        return question
    except Exception as error:
        return Unasked("", "", failure=failure_of(error, task))


async def play(
    task: Task,
    request: RolloutRequest,
    agents: Mapping[str, Agent],
    seed: int,
    accept: Callable[[Rollout], object] | None = None,
    deadline: float | None = None,
) -> RolloutResult:
    """Play one rollout, with up to ATTEMPTS attempts. The seed names the noise: same seed and weights, same rollout.
    accept: raises for a rollout that cannot be used, which is then a failed one. deadline: seconds that all attempts
    together may take, without the outages of services that they wait for."""
    name = f"{request.query}/{request.rollout}"
    split = "eval" if request.query.startswith("eval/") else "train"
    with spans.span("rollout", name, name, {"split": split, "status": "cancelled"}) as seen:
        result = await _play(task, request, agents, seed, accept, deadline)
        ok = result.rollout is not None
        seen |= {"status": "ok" if ok else "failed", "failed_by": result.kind or ""}
        seen |= {"correct": float(result.rollout.correct) if result.rollout else 0.0}
        seen |= {"attempts": result.attempt + 1}
        return result


async def _play(
    task: Task,
    request: RolloutRequest,
    agents: Mapping[str, Agent],
    seed: int,
    accept: Callable[[Rollout], object] | None,
    deadline: float | None,
) -> RolloutResult:
    if isinstance(request.question, Unasked):
        return RolloutResult(request, 0, None, request.question.failure.text, request.question.failure.kind)
    began = time.monotonic()
    attempts = _Attempts(task, request, agents, seed, accept)
    try:
        async with outage.timeout(deadline) as limit:
            result = await attempts.play(limit.expired)
    except TimeoutError:  # of ours: those of the task's code are failures
        result = None
    if result is None:
        assert deadline is not None
        text = (
            f"{request.query}/{request.rollout} had not ended after {deadline:g} s (rollout.deadline), "
            f"in attempt {attempts.number} with {attempts.calls()} calls of sub-agents"
        )
        result = RolloutResult(request, attempts.number, None, text, "deadline")
    seconds, tools = time.monotonic() - began, attempts.tools.metrics()
    return replace(result, calls=attempts.calls(), seconds=seconds, tools=tools)


@dataclass(slots=True)
class _Attempts:
    """The attempts at one rollout; arguments as of play()."""

    task: Task
    request: RolloutRequest
    agents: Mapping[str, Agent]
    seed: int
    accept: Callable[[Rollout], object] | None
    number: int = 0
    episode: Episode | None = None  # of the last
    tools: ToolCalls = field(default_factory=ToolCalls)

    def calls(self) -> int:
        return 0 if self.episode is None else self.episode.calls()

    async def play(self, is_late: Callable[[], bool]) -> RolloutResult | None:
        """What came of them; None when time ran out, for code that made an error of its own of its cancellation."""
        request, failure = self.request, None
        for self.number in range(ATTEMPTS):
            self.episode = episode = Episode(
                request.query,
                request.rollout,
                self.agents,
                mix(self.seed, self.number),
                self.number,
                self.tools,
            )
            try:
                rollout = await play_attempt(self.task, request.question, episode)
                if self.accept is not None:
                    self.accept(rollout)
            except asyncio.CancelledError:
                if (running := asyncio.current_task()) is None or running.cancelling():
                    raise
                text = f"play() of {request.query}/{request.rollout} was cancelled by something it awaited"
                failure = Failure("task", text)
            except (Exception, SystemExit) as error:  # a tool that exits ends its rollout, not the worker
                failure = failure_of(error, self.task)
            else:
                return RolloutResult(request, self.number, rollout, mismatches=episode.mismatches())
            if is_late():
                return None
            if failure.kind != "infrastructure":
                break
        assert failure is not None
        text = failure.text
        if request.question.secret and failure.wordless is not None:
            text = f"{failure.wordless}; its message is withheld, because the question is secret"
        return RolloutResult(request, self.number, None, text, failure.kind)


async def play_attempt(task: Task, question: Question, episode: Episode) -> Rollout:
    """Play one attempt. Whatever its end, no task of it runs afterwards and the engines hold nothing of it."""
    attempt = Attempt()
    try:
        with attempt:
            return episode.check(await task.play(question, episode))
    finally:
        episode.end()
        try:
            await attempt.end()
        finally:
            episode.release()
            episode.record()


async def play_all(
    task: Task,
    requests: Sequence[RolloutRequest],
    agents: Mapping[str, Agent],
    seed: Callable[[RolloutRequest], int],
    done: Callable[[RolloutResult], Awaitable[None]],
    accept: Callable[[Rollout], object] | None = None,
    deadline: float | None = None,
) -> None:
    """Play all rollouts concurrently; `done` is awaited for each as it ends. accept, deadline: as in play. The first
    error that is the program's cancels the rest."""

    async def one(request: RolloutRequest) -> None:
        await done(await play(task, request, agents, seed(request), accept, deadline))

    try:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(one(request))
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
    seen: Callable[[int, RolloutResult], None] | None = None,
    accept: Callable[[Rollout], object] | None = None,
    deadline: float | None = None,
    place: str = "",
) -> Accuracy:
    """One rollout of each question. Failed rollouts are counted beside the mean, not in it. `seen` is called with each
    rollout as it ends and the number of its question. accept, deadline: as in play. place: tells this evaluation from
    the others of a run, e.g. "heldout/60", so that each call of a tool has a name of its own. Raises
    InfrastructureError where none succeeded."""
    if greedy:
        agents = {role: replace(agent, temperature=0.0) for role, agent in agents.items()}
    accuracy = Accuracy()

    async def count(result: RolloutResult) -> None:
        if seen is not None:
            seen(numbers[result.request.query], result)
        if result.rollout is None:
            accuracy.failed += 1
            accuracy.failure = result.failure
            return
        accuracy.n += 1
        accuracy.correct += result.rollout.correct
        for role, d in result.rollout.d_k().items():
            histogram = accuracy.calls.setdefault(role, {})
            histogram[d] = histogram.get(d, 0) + 1

    name = "/".join(["eval", *([place] if place else []), "greedy" if greedy else "sampled"])
    requests = [RolloutRequest(f"{name}/{i}", q, 0) for i, q in enumerate(questions)]
    numbers = {request.query: i for i, request in enumerate(requests)}

    def seed_of(request: RolloutRequest) -> int:
        return mix(seed, numbers[request.query])

    await play_all(task, requests, agents, seed_of, count, accept, deadline)
    if accuracy.failed and not accuracy.n:
        raise InfrastructureError(all_failed(accuracy.failed, "an evaluation", accuracy.failure))
    return accuracy


def all_failed(n: int, where: str, failure: str) -> str:
    """The error's text where every rollout failed: something is down, and it is none of the rollouts' doing."""
    return f"all {n} rollouts of {where} failed, the last with: {failure}"
