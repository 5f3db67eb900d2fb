"""What a rollout worker's ways of playing share: its links, its rules of groups, and the way out of a rollout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mgrpo.config import RunConfig
from mgrpo.credit import check_scores, trajectory_reward
from mgrpo.environments.episode import mix
from mgrpo.environments.failure import encodable, shortened
from mgrpo.environments.task import Question, Task
from mgrpo.errors import ConfigError, DeadlineError, GroupClosedError
from mgrpo.pipeline.play import RolloutResult, question_of
from mgrpo.pipeline.shipper import Shipper
from mgrpo.pipeline.team import WAIT_SLICE, Team
from mgrpo.pipeline.worker_loop import WorkerLoop
from mgrpo.record.rollouts import RolloutRecorder
from mgrpo.store.records import World
from mgrpo.store.worker_client import WorkerClient, WorkerGroup
from mgrpo.types import MAIN, Rollout

MAX_FAILED_BATCHES = 3  # a batch can be one question that nothing answers; that many in a row are an outage


@dataclass(slots=True)
class WorkerContext:
    """One rollout worker's parts. number: of 0 .. rollout.workers - 1."""

    config: RunConfig
    number: int
    task: Task
    store: WorkerClient
    shipper: Shipper
    recorder: RolloutRecorder
    team: Team
    loop: WorkerLoop
    _paused_at: float = -1e9  # when published() last found a paused worker
    _scored: set[str] = field(default_factory=set)  # roles whose scores have fitted their reward

    @property
    def share(self) -> int:
        """Groups of one step that are this worker's."""
        return max(1, self.config.trainer.pool // self.config.rollout.workers)

    def log(self, line: str) -> None:
        """A line for people."""
        self.store.report("phase", {"text": line})

    def seed(self, index: int) -> int:
        """Of the rollouts of group number `index`."""
        return mix(self.config.seed, index)

    def published(self) -> int:
        """The oldest version that the training roles have published (-1 before the first)."""
        world = self.store.world()
        if world.paused:
            self._paused_at = time.monotonic()
        return oldest_version(world)

    def wait_a_little(self, version: int, since: float) -> None:
        """Wait for a version, but not for long: a dropped group may have left room for another one meanwhile. Raises
        DeadlineError when nothing has come for idle_timeout seconds since `since`."""
        self.check_idle(version, since)
        with contextlib.suppress(DeadlineError):
            wanted = dict.fromkeys(self.config.training_roles, version)
            self.store.wait(versions=wanted, timeout=WAIT_SLICE)
        self.loop.check()

    def check_idle(self, version: int, since: float) -> None:
        """Raise DeadlineError when this version has not come for idle_timeout seconds since `since`, or since another
        worker last waited for a service that is down."""
        if time.monotonic() - max(since, self._paused_at) > self.config.store.idle_timeout:
            raise DeadlineError(
                f"worker {self.number}: version {version} of {', '.join(self.config.training_roles)} was not "
                f"published within {self.config.store.idle_timeout:g} s"
            )

    def open_group(self, index: int) -> tuple[WorkerGroup, Question] | None:
        """Group number `index`, opened again after a restart; None where the store has closed it. Raises
        RetryAfterError while it is not admitted, GroupHeldError while another worker that is alive has it."""
        question = question_of(self.task, index, self.config.seed)
        try:
            group = self.store.open_group(
                query=f"{index // self.config.trainer.pool}/{index}",
                k=self.config.trainer.group_size,
                d_max={role: self.config.agents[role].d_max for role in self.config.roles},
                index=index,
                meta={"question": shortened(question.text[:200])},
                seed=self.config.seed,
                timeout=0.0,
            )
        except GroupClosedError:
            return None
        return group, question

    def is_beyond_the_run(self, index: int) -> bool:
        """No step will claim this group: it comes after those of the last step, and no group that was lost to some role
        left room. Asks the store, where the number does not say it."""
        trainer = self.config.trainer
        if index < trainer.steps * trainer.questions:
            return False
        needed = []
        for role in self.store.stats()["roles"].values():
            done = int(role["step"]) + 1
            passed = int(role["skipped"]) + int(role["surplus"]) + done * trainer.questions
            needed.append(passed + (trainer.steps - done) * trainer.pool)
        return index >= max(needed)

    def deliver(self, group: WorkerGroup, result: RolloutResult) -> None:
        """Record a result and hand it to the shipper."""
        self.recorder.train(
            group.index // self.config.trainer.pool,
            group.index,
            group.query,
            result.request.rollout,
            asked(result.request.question),
            result.rollout,
            result.failure,
        )
        self.shipper.ship(group, result)

    def check_rewards(self, rollout: Rollout) -> None:
        """Raise for a rollout that could not be paid. Where the names of its scores never fitted the reward, that would
        be so in every rollout: ConfigError. Where they did, or the task declared them, it is this rollout's failure."""
        for t in rollout.trajectories():
            try:
                check_scores(t.role, self.config.agents[t.role].reward, t.scores)
            except ConfigError as error:
                if t.role in self.task.scores or t.role in self._scored:
                    raise ValueError(str(error)) from None
                raise
            self._scored.add(t.role)


def main_reward(config: RunConfig) -> Callable[[Rollout], float]:
    """What the main agent's trajectory of a rollout earns."""
    weights = config.agents[MAIN].reward
    return lambda rollout: trajectory_reward(MAIN, weights, rollout.main.scores, rollout.correct)


def asked(question: Question) -> tuple[str, str]:
    """A question and its gold answer, as the record can write them."""
    return encodable(str(question.text)), encodable(str(question.answer))


def oldest_version(world: World) -> int:
    """Of those that the training roles have published; -1 before the first."""
    return min(-1 if role.version is None else role.version for role in world.roles)


def is_closed(group: WorkerGroup) -> bool:
    """Whether the store takes nothing more for this group."""
    return group.state != "open"
