"""What a rollout worker's ways of playing share: its links, its rules of groups, and the way out of a rollout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mgrpo.config import RunConfig
from mgrpo.credit import StageRewards, check_scores, trajectory_reward
from mgrpo.environments.episode import mix
from mgrpo.environments.failure import encodable, shortened
from mgrpo.environments.task import Question, Task
from mgrpo.errors import ConfigError, ContextOverflowError, DeadlineError, GroupClosedError
from mgrpo.pipeline.play import RolloutResult, question_of
from mgrpo.pipeline.shipper import Shipper
from mgrpo.pipeline.team import WAIT_SLICE, Team
from mgrpo.pipeline.worker_loop import WorkerLoop
from mgrpo.record import spans
from mgrpo.record.rollouts import Asked, RolloutRecorder
from mgrpo.store.records import World
from mgrpo.store.worker_client import WorkerClient, WorkerGroup
from mgrpo.trajectory_log.client import too_many_experts
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
    _scored: set[tuple[str, int]] = field(default_factory=set)  # role and stage whose scores have fitted
    _stage: int = 0  # of the newest group that was opened
    _wait: tuple[int, int] | None = None  # since when (spans.now()) this worker waits, and for which version
    _rewards: StageRewards = field(init=False)

    def __post_init__(self) -> None:
        self._rewards = StageRewards(self.config)

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
        if self._wait is None:
            self._wait = spans.now(), version
        with contextlib.suppress(DeadlineError):
            wanted = dict.fromkeys(self.config.training_roles, version)
            self.store.wait(versions=wanted, timeout=WAIT_SLICE)
        self.loop.check()

    def waited(self) -> None:
        """What was waited for is there, or is not waited for any more: one span of all the slices."""
        if self._wait is not None:
            (start, version), self._wait = self._wait, None
            spans.add("wait", f"version {version}", spans.MAIN_LANE, start, spans.now(), {"step": version})

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
                query=query_of(index, self.config.trainer.pool),
                k=self.config.trainer.group_size,
                d_max={role: self.config.agents[role].d_max for role in self.config.roles},
                index=index,
                meta={"question": "" if question.secret else shortened(question.text[:200])},
                seed=self.config.seed,
                timeout=0.0,
            )
        except GroupClosedError:
            return None
        if (stage := self.config.stage_of(index)) > self._stage:
            self._stage = stage
            if self.number == 0:
                name, step = self.config.task.stage_name(stage), index // self.config.trainer.pool
                self.log(f"stage {name} from step {step} on")
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
            result.kind or "",
        )
        self.shipper.ship(group, result)

    def check_rewards(self, rollout: Rollout) -> None:
        """Raise for a rollout that could not be paid, or that is to be trained on and has more experts than its
        trajectory log takes: ContextOverflowError. Where the names of its scores never fitted the reward of its
        stage, that would be so in every rollout: ConfigError. Where they did, or the task declared them, it is this
        rollout's failure."""
        index = index_of(rollout.query)
        stage = self.config.task.last_stage if index is None else self.config.stage_of(index)
        for t in rollout.trajectories():
            weights = (
                self._rewards.of_evaluation(t.role)
                if index is None
                else self._rewards.of_group(t.role, index)
            )
            try:
                check_scores(t.role, weights, t.scores)
            except ConfigError as error:
                where = f"stage {self.config.task.stage_name(stage)}: " if self.config.task.stages else ""
                if t.role in self.task.scores or (t.role, stage) in self._scored:
                    raise ValueError(f"{where}{error}") from None
                raise ConfigError(f"{where}{error}") from None
            self._scored.add((t.role, stage))
            if index is not None and t.role in self.config.training_roles and (why := too_many_experts(t)):
                raise ContextOverflowError(why)


def main_reward(config: RunConfig) -> Callable[[int, Rollout], float]:
    """What the main agent's trajectory of a rollout earns in a group of that number."""
    rewards = StageRewards(config)
    return lambda index, rollout: trajectory_reward(
        MAIN, rewards.of_group(MAIN, index), rollout.main.scores, rollout.correct
    )


def query_of(index: int, pool: int) -> str:
    """What the store calls group number `index`; pool: groups that a step claims."""
    return f"{index // pool}/{index}"


def index_of(query: str) -> int | None:
    """The number of a training group of that name; None for the query of an evaluation."""
    step, _, index = query.rpartition("/")
    return int(index) if step.isdigit() else None


def asked(question: Question) -> Asked:
    """A question and its gold answer, as the record can write them, and whether it may."""
    secret = str(question.id) if question.secret else None
    return Asked(encodable(str(question.text)), encodable(str(question.answer)), secret)


def oldest_version(world: World) -> int:
    """Of those that the training roles have published; -1 before the first."""
    return min(-1 if role.version is None else role.version for role in world.roles)


def is_closed(group: WorkerGroup) -> bool:
    """Whether the store takes nothing more for this group."""
    return group.state != "open"
