"""Streaming rollouts, the way of trainer.max_lag >= 1: a constant number is in flight, and weights arrive on the way.

    _follow (one a role)   a version is published -> fetched -> loaded between two decode steps
    _open_groups           a place is free -> the store admits this worker's next group
    _rollout (many)        played -> recorded and shipped -> the next one starts in its place
    run                    watches: closed groups, dead workers, evaluations, reports, the end

Everything but the links' calls, which run on threads, happens on one event loop, so no state here needs a lock:
OpenGroups says which rollout starts next, GroupShare which group is opened next, and `_news` wakes whoever waits. A
rollout may sample under several versions; the bound on their age is the store's, which admits a group, and names the
oldest version to start it with, so that no token of it is too old when its turn comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from mgrpo.config import RunConfig
from mgrpo.environments.task import Question
from mgrpo.errors import DeadlineError, GroupHeldError, InfrastructureError, RetryAfterError
from mgrpo.pipeline.evaluations import Evaluations
from mgrpo.pipeline.group_share import GroupShare
from mgrpo.pipeline.open_groups import OpenGroups
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, all_failed, play
from mgrpo.pipeline.rollout_metrics import Load, RolloutMetrics
from mgrpo.pipeline.team import WAIT_SLICE
from mgrpo.pipeline.worker_context import MAX_FAILED_BATCHES, WorkerContext, is_closed, oldest_version
from mgrpo.profiling.window import begin_step
from mgrpo.services.counters import take
from mgrpo.store.records import World
from mgrpo.store.worker_client import WorkerGroup

QUEUE_SECONDS = 0.25  # between two looks at the engines' queues

T = TypeVar("T")


def concurrency_of(config: RunConfig) -> int:
    """Rollouts in flight in each worker."""
    if config.rollout.concurrency is not None:
        return config.rollout.concurrency
    trainer = config.trainer
    admitted = (trainer.max_lag - trainer.window_lag + 1) * trainer.pool  # groups, to all workers
    return min(config.rollout.slots, -(-admitted // config.rollout.workers) * trainer.group_size)


@dataclass(slots=True)
class _Playing:
    """A group in this worker's hands."""

    group: WorkerGroup
    question: Question
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # its rollouts that have begun
    cancelled: bool = False  # they were, since the store takes nothing more of it


class Streaming:
    """Plays one worker's groups. run() once, on the worker's loop; then close()."""

    def __init__(self, context: WorkerContext, evaluations: Evaluations) -> None:
        config = context.config
        self._context, self._evaluations, self._config = context, evaluations, config
        self._groups = OpenGroups(concurrency_of(config))
        self._playing: dict[int, _Playing] = {}
        self._rollouts: set[asyncio.Task[None]] = set()
        self._share = GroupShare(context.number, config.rollout.workers)
        self._seen_workers = {context.number}  # those that have been alive while this one ran
        self._began = time.monotonic()
        self._world: World | None = None
        self._worlds = 0  # how often the store has been heard
        self._metrics, self._load = RolloutMetrics(), Load(self._groups.concurrency, self._began)
        self._skipped = 0  # groups that the store had closed incomplete, since the last report
        self._failed_in_a_row = 0
        self._reported = -1  # the newest version for which there was a report
        self._loading = 0  # engines that swap their weights now
        self._evaluating = False
        self._news, self._news_event = 0, asyncio.Event()
        self._threads = ThreadPoolExecutor(len(config.training_roles) + 3, "mgrpo-streaming")
        self._tasks: asyncio.TaskGroup

    def close(self) -> None:
        """Wait for the threads, whose calls end once the clients are closed. Idempotent."""
        self._threads.shutdown(cancel_futures=True)

    async def run(self) -> int:
        """Play until every trainer has made its last step, and worker 0's engines hold the weights of it; the version
        then published. The engines hold the newest weights when it begins."""
        self._world = await self._in_thread(self._context.store.world)
        self._reported = self._published
        self._share = GroupShare(self._context.number, self._config.rollout.workers, self._first_needed())
        self._began = self._load.since = time.monotonic()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                background = [
                    self._tasks.create_task(self._follow(role)) for role in self._config.training_roles
                ]
                background += [
                    self._tasks.create_task(work) for work in (self._open_groups(), self._look_at_queues())
                ]
                self._evaluate_if_due()  # what a worker before this one may not have come to
                await self._watch()
                for task in [*background, *self._rollouts]:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others are its consequence
        return self._published

    # -- weights -----------------------------------------------------------------------------------------------------

    async def _follow(self, role: str) -> None:
        """Bring each version of a role into its engine, as it is published."""
        label, version = "", -1
        while True:
            self._world = world = await self._in_thread(self._next_world, role, version + 1)
            self._worlds += 1
            self._notify()
            status = next(status for status in world.roles if status.role == role)
            if status.version is None or status.label == label:
                continue
            label, version = status.label, status.version
            held = -1
            while held < version:  # an older one comes first where it had begun to arrive
                weights = await self._in_thread(self._context.team.fetch, role, version)
                if weights is None:
                    break
                await self._until(lambda: not self._evaluating)  # its weights are held
                self._loading += 1
                try:
                    await self._context.team.load(role, weights)
                finally:
                    self._loading -= 1
                held = weights.version
                begin_step(min(self._context.team.versions().values()) + 1, self._context.log)
                self._evaluate_if_due()
                self._start_rollouts()
                self._notify()

    def _next_world(self, role: str, version: int) -> World:
        """The state of everything, as soon as this version is published, or after a moment: a trainer may have gone
        back to an older one, a group may be lost, a worker dead."""
        with contextlib.suppress(DeadlineError):
            return self._context.store.wait(versions={role: version}, timeout=WAIT_SLICE)
        return self._context.store.world()

    def _evaluate_if_due(self) -> None:
        """Evaluate beside the rollouts. Newer weights wait until it is over."""
        version = min(self._context.team.versions().values())
        if (
            self._context.number == 0
            and not self._evaluating
            and version < self._config.trainer.steps  # those of the last step are evaluated at the run's end
            and self._evaluations.due(version)
        ):
            self._evaluating = True
            self._tasks.create_task(self._evaluate(version))

    async def _evaluate(self, version: int) -> None:
        await self._until(lambda: not self._loading)
        await self._evaluations.run_due(version)
        self._evaluating = False
        self._notify()

    # -- groups ------------------------------------------------------------------------------------------------------

    async def _open_groups(self) -> None:
        """Open this worker's groups in order, each as soon as a place is free that no open group fills."""
        while True:
            await self._until(self._groups.wants_group)
            seen, index = self._worlds, self._share.next(self._playing)
            try:
                found = await self._in_thread(self._open, index)
            except GroupHeldError:
                self._share.set_aside(index)
                continue
            except RetryAfterError:  # until a version is published, or a group is lost
                await self._until(lambda: self._worlds != seen)  # noqa: B023 - awaited at once
                continue
            self._share.passed(index)
            if found is None or (is_closed(found[0]) and len(found[0].finished) < found[0].k):
                self._skipped += 1
                continue
            group, question = found
            missing = [k for k in range(group.k) if k not in group.finished]
            if missing:
                self._playing[index] = _Playing(group, question)
                self._groups.add(index, missing, group.min_versions)
                self._start_rollouts()

    def _open(self, index: int) -> tuple[WorkerGroup, Question] | None:
        if self._context.is_beyond_the_run(index):
            raise RetryAfterError(f"group {index} comes after those of the last step")
        return self._context.open_group(index)

    def _divide_groups(self) -> None:
        """Take over the groups of workers that are dead: those that were alive and are not, or have not come to life
        since this one began, for as long as a worker may be silent."""
        assert self._world is not None
        numbers = {f"rollout-{number}": number for number in range(self._config.rollout.workers)}
        live = {numbers[name] for name in self._world.workers if name in numbers}
        self._seen_workers |= live
        if not live:  # not even this one: the store has heard of nobody yet
            live = set(numbers.values())
        elif time.monotonic() - self._began < self._config.store.heartbeat_timeout:
            live |= set(numbers.values()) - self._seen_workers
        before = self._share.classes()
        self._share.divide(live, self._first_needed())
        if more := sorted(set(self._share.classes()) - set(before)):
            names = ", ".join(f"rollout-{number}" for number in more)
            self._background(
                self._context.log, f"worker {self._context.number} takes over the groups of {names}"
            )

    def _first_needed(self) -> int:
        """Every group before this index is trained on or lost: of those before the published version's place, the claim
        window may have passed over a few."""
        trainer = self._config.trainer
        return max(0, self._published * trainer.questions - trainer.claim_window + 1)

    def _leave_closed_groups(self) -> None:
        """End what is played of groups of which the store takes nothing more."""
        for index, playing in list(self._playing.items()):
            if playing.group.closed and not playing.cancelled:
                playing.cancelled = True
                if self._groups.drop(index):
                    del self._playing[index]
                for task in playing.tasks:
                    task.cancel()

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def _start_rollouts(self) -> None:
        self._leave_closed_groups()
        versions = self._context.team.versions()
        while (pair := self._groups.next(versions)) is not None:
            index, rollout = pair
            playing = self._playing[index]
            task = self._tasks.create_task(self._rollout(playing, rollout))
            self._rollouts.add(task)
            task.add_done_callback(self._rollouts.discard)
            self._load.change(1, time.monotonic())

    async def _rollout(self, playing: _Playing, rollout: int) -> None:
        group, result = playing.group, None
        running = asyncio.current_task()
        assert running is not None
        playing.tasks.add(running)
        try:
            if not playing.cancelled:
                result = await self._play(playing, rollout)
        except asyncio.CancelledError:
            if not playing.cancelled:
                raise
        finally:
            playing.tasks.discard(running)
        if (
            running.cancelling() > playing.cancelled
        ):  # the worker ends, whatever the task made of its cancellation
            raise asyncio.CancelledError
        if result is not None and not group.closed:
            self._metrics.take(result)
            self._check_outage(result)
            self._context.deliver(group, result)
        self._load.change(-1, time.monotonic())
        if self._groups.ended(group.index, rollout):
            del self._playing[group.index]
        self._start_rollouts()
        self._notify()

    async def _play(self, playing: _Playing, rollout: int) -> RolloutResult:
        context, group = self._context, playing.group
        return await play(
            context.task,
            RolloutRequest(group.query, playing.question, rollout),
            context.team.agents,
            context.seed(group.index),
            context.check_rewards,
            self._config.rollout.deadline,
        )

    def _check_outage(self, result: RolloutResult) -> None:
        """Raise InfrastructureError after MAX_FAILED_BATCHES steps' worth of rollouts in a row that failed: the next
        would fare no better."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if result.rollout is None else 0
        if (
            self._failed_in_a_row
            == MAX_FAILED_BATCHES * self._context.share * self._config.trainer.group_size
        ):
            where = f"the last {MAX_FAILED_BATCHES} steps' worth"
            raise InfrastructureError(all_failed(self._failed_in_a_row, where, result.failure))

    # -- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Until the run is over. Raises DeadlineError when nothing has come for idle_timeout seconds."""
        idle_since = retried = time.monotonic()
        while not self._is_over():
            seen = self._news
            if time.monotonic() - retried >= WAIT_SLICE:
                retried = time.monotonic()
                self._share.retry()
            self._context.shipper.check()
            self._start_rollouts()
            self._divide_groups()
            await self._report()
            assert self._world is not None
            if self._groups.in_flight or self._evaluating or self._world.paused:
                idle_since = time.monotonic()
            else:
                self._context.check_idle(self._published + 1, idle_since)
            await self._until(lambda: self._news != seen)  # noqa: B023 - awaited at once
        await self._report()

    def _is_over(self) -> bool:
        steps = self._config.trainer.steps
        if self._published < steps or self._evaluating:
            return False
        return self._context.number != 0 or min(self._context.team.versions().values()) >= steps

    async def _report(self) -> None:
        """Report of the time in which one version was the newest, when it no longer is."""
        if self._published <= self._reported:
            return
        now = time.monotonic()
        seconds = max(now - self._load.since, 1e-9)
        closed = self._skipped + self._context.shipper.closed_groups()
        load = self._load.report(now)
        report = self._metrics.report(seconds) | load | {"rollout/closed_groups": float(closed)} | take()
        step, self._reported = self._reported, self._published
        self._metrics, self._skipped = RolloutMetrics(), 0
        await self._in_thread(
            self._context.store.report, "rollouts", {"step": max(0, step), "metrics": report}
        )

    async def _look_at_queues(self) -> None:
        while True:
            self._load.queue(self._context.team.waiting())
            await asyncio.sleep(QUEUE_SECONDS)

    # -- waiting -----------------------------------------------------------------------------------------------------

    @property
    def _published(self) -> int:
        assert self._world is not None
        return oldest_version(self._world)

    def _notify(self) -> None:
        """Something has changed: whoever waits looks again."""
        self._news += 1
        self._news_event.set()
        self._news_event = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Nothing else runs between the condition's coming true and the caller's going on. Every wait ends: each role's
        follower has news at least every WAIT_SLICE seconds, and its own calls have deadlines."""
        while not condition():
            await self._news_event.wait()

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """The result of a call that blocks. Cancelled, it leaves the call to its own deadline."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _background(self, call: Callable[..., object], *arguments: object) -> None:
        self._tasks.create_task(self._in_thread(call, *arguments))
