"""Replay: from the record of a rollout back through the stages of training, bit by bit.

    scores -> reward -> advantage -> alignment -> batch -> loss

The rollouts of the step come from the workers' records, what training made of them from the trainer's; in between the
trainer's own functions run again: BatchBuilder (credit, draw, advantages, packing) and Learner (loss, update). A loss
needs the weights of its moment, so training is run again from the last kept checkpoint up to the step. What a resumed
run may change (the learning rate follows from the number of steps, threads, ranks, whether prefixes were shared) is
taken from the record of each step, everything else from the run's config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mgrpo.algorithms import open_algorithm
from mgrpo.config import RunConfig
from mgrpo.config.policy import EXTERNAL
from mgrpo.credit import StageRewards, trajectory_reward
from mgrpo.errors import ConfigError, CorruptionError
from mgrpo.losses.registry import find_loss
from mgrpo.model.loading import load_policy, load_reference
from mgrpo.pipeline.batch import BatchBuilder, StepBatch, merge_streams
from mgrpo.pipeline.step_record import step_body
from mgrpo.record.reader import RecordedRollout, Recording
from mgrpo.record.schema import StepBody, StepSettings, TrajectoryRecord
from mgrpo.store.records import ClaimedGroup, ClaimedInvocation, ClaimedRollout
from mgrpo.trainers.base import Checkpoint
from mgrpo.trainers.torch.checkpoint import latest_checkpoint, restore_checkpoint
from mgrpo.trainers.torch.learner import Learner, new_learner
from mgrpo.trajectory_log.format import LogRef
from mgrpo.types import MAIN, Trajectory

EQUAL, DIFFERS, UNKNOWN = "equal", "differs", "not recorded"
ALIGNMENT = ("multiplicity", "weight")
BATCH = ("length", "active", "version_min", "minibatch", "tokens_crc", "loss_mask_crc", "logprobs_crc")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of one role: whether what training used can be rebuilt bit for bit, and if not, what differs."""

    role: str
    name: str  # reward, advantage, alignment, batch, loss
    status: str
    field: str = ""
    recorded: object = None
    rebuilt: object = None


class Replayer:
    """Replays rollouts of one run. folders: agent folder of a role (policies, record), on this machine."""

    def __init__(self, config: RunConfig, recording: Recording, folders: Callable[[str], Path]) -> None:
        self._config, self._recording, self._folders = config, recording, folders
        self._learners: dict[str, tuple[Learner, int, dict[str, float]]] = {}

    def replay(self, rollout_id: str) -> list[Stage]:
        """Every stage of every role that trained on this rollout. Raises ConfigError when it is not in the record."""
        rollout = self._recording.rollouts.get(rollout_id)
        if rollout is None:
            raise ConfigError(f"rollout {rollout_id!r} is not in the record")
        if rollout.head.split != "train":
            raise ConfigError(f"rollout {rollout_id!r} is of an evaluation: nothing was trained on it")
        stages: list[Stage] = []
        for role in self._config.training_roles:
            near = rollout.head.index // self._config.trainer.pool
            step = self.step_of(role, rollout.head.query, near)
            if step is not None:
                stages += self._role(role, step, rollout)
            elif gap := self._gap(role, near):
                stages += [Stage(role, name, UNKNOWN, gap) for name in STAGES]
        return stages

    def step_of(self, role: str, query: str, near: int) -> int | None:
        """The step in which a role trained on a group: `near`, or one close by in an asynchronous run. None where there
        is none, as for a group that a step set aside."""
        steps = [step for r, step in self._recording.steps if r == role]
        for step in sorted(steps, key=lambda s: (abs(s - near), s)):
            if query in self._queries(role, step):
                return step
            if abs(step - near) > 2 * (1 + self._config.trainer.max_lag):
                break
        return None

    def _queries(self, role: str, step: int) -> list[str]:
        try:
            return self._recording.steps[role, step].body().queries
        except CorruptionError:  # see _gap
            return []

    def _gap(self, role: str, step: int) -> str:
        """Why a group that was sampled for `step` may have been trained on all the same; "" where it was not."""
        record = self._recording.steps.get((role, step))
        if record is None:
            last = max((s for r, s in self._recording.steps if r == role), default=-1)
            return f"step {step} of {role}" if step < last or self._recording.notes() else ""
        try:
            record.body()
        except CorruptionError as error:
            return str(error)
        return ""

    # -- one role ------------------------------------------------------------------------------------------------

    def _role(self, role: str, step: int, rollout: RecordedRollout) -> list[Stage]:
        recorded = self._recording.steps[role, step].body()
        try:
            batch, whole = self._build(role, step, recorded)
        except CorruptionError as error:
            return [Stage(role, name, UNKNOWN, str(error)) for name in STAGES]
        if batch is None:
            return [Stage(role, name, UNKNOWN, "a rollout of the step") for name in STAGES]
        rebuilt = step_body(batch, {}, recorded.settings)
        group = recorded.queries.index(rollout.head.query)
        pairs = list(_pairs(recorded, rebuilt, group, rollout.head.rollout))
        stages = [
            self._compare(
                role, "reward", [*_scores(recorded, rebuilt, pairs), *_columns(pairs, ("reward",))]
            ),
            self._compare(
                role, "advantage", [*_statistics(recorded, rebuilt, group), *_columns(pairs, ("advantage",))]
            ),
            self._compare(role, "alignment", _columns(pairs, ALIGNMENT)),
        ]
        if not whole and open_algorithm(self._config, role).per_token:  # it reads the tokens
            stages[1] = Stage(role, "advantage", UNKNOWN, "tokens of the step")
        if not whole:
            return [*stages, *(Stage(role, name, UNKNOWN, "tokens of the step") for name in STAGES[3:])]
        minibatch = int(pairs[0][1]["minibatch"]) if pairs else 0
        batches = [*_columns(pairs, BATCH), *_minibatches(recorded, rebuilt, minibatch)]
        batches += _shared(recorded, rebuilt, pairs)
        stages.append(self._compare(role, "batch", batches))
        stages.append(self._loss(role, step, recorded))
        return stages

    def _build(self, role: str, step: int, recorded: StepBody) -> tuple[StepBatch | None, bool]:
        """The step as the builder makes it from the recorded rollouts (None when some are missing), and whether all
        tokens were there. The record names the groups that were chosen from a larger pool: nothing is chosen again."""
        tokens = _RecordedTokens()
        groups = []
        for query, index in zip(recorded.queries, recorded.indices, strict=True):
            rollouts = list(self._recording.group(query, recorded.k))
            if len(rollouts) < recorded.k:
                return None, False
            groups.append(_claimed(self._config, role, query, index, rollouts, tokens))
        settings = recorded.settings
        ranks = settings.data_ranks or settings.ranks
        builder = BatchBuilder(self._config, role, tokens, ranks, settings.share_prefixes)
        return builder.build(step, groups), tokens.whole

    @staticmethod
    def _compare(role: str, name: str, pairs: list[tuple[str, Any, Any]]) -> Stage:
        for field, recorded, rebuilt in pairs:
            if not _same(recorded, rebuilt):
                return Stage(role, name, DIFFERS, field, recorded, rebuilt)
        return Stage(role, name, EQUAL)

    # -- loss ----------------------------------------------------------------------------------------------------

    def _loss(self, role: str, step: int, recorded: StepBody) -> Stage:
        owner = self._config.policy_of(role)
        if self._config.agents[owner].policy.trainer == EXTERNAL:
            return Stage(role, "loss", UNKNOWN, "a program of the user's took the step")
        metrics = self._train_up_to(owner, step)
        if isinstance(metrics, str):
            return Stage(role, "loss", UNKNOWN, metrics)
        names = sorted(name for name in metrics if name.startswith(("loss/", "policy/")))
        known = sorted(name for name in recorded.metrics if name.startswith(("loss/", "policy/")))
        if names != known:
            return Stage(role, "loss", DIFFERS, "names of the metrics", known, names)
        return self._compare(role, "loss", [(n, recorded.metrics[n], metrics[n]) for n in names])

    def _train_up_to(self, role: str, step: int) -> dict[str, float] | str:
        """Metrics of `step` trained again; a text when something it needs was not kept. Replaying in the order of
        steps continues where the last one stopped."""
        known = self._learners.get(role)
        checkpoint = self._checkpoint(role, step)
        at = checkpoint.step if checkpoint else 0
        learner: Learner | None = None
        metrics: dict[str, float] = {}
        if known is not None and at < known[1] <= step + 1:
            learner, at, metrics = known
        for number in range(at, step + 1):
            taken = self._taken(role, number)
            if isinstance(taken, str):
                self._learners.pop(role, None)
                return taken
            shares = taken[0].share_prefixes
            if learner is None:
                learner = self._learner(role, checkpoint, shares)
            elif learner.policy.config.share_prefixes != shares:  # a resumed run went on in the other way
                learner = self._in_the_other_way(role, learner, shares)
            if shares and not learner.policy.shares:
                return f"shared prefixes, which step {number} had and this policy has not: {learner.policy.why_not}"
            metrics = self._train(learner, *taken)
            self._learners[role] = (learner, number + 1, metrics)
        return metrics

    def _train(
        self, learner: Learner, settings: StepSettings, batches: Sequence[StepBatch]
    ) -> dict[str, float]:
        threads = torch.get_num_threads()  # sums are rounded as they are divided among threads
        torch.set_num_threads(settings.threads)
        try:
            return learner.train(
                merge_streams(batches), self._config.trainer.old_logprobs == "recompute", settings.lr
            )
        finally:
            torch.set_num_threads(threads)

    def _taken(self, role: str, step: int) -> tuple[StepSettings, list[StepBatch]] | str:
        """How a trainer took a step, and the batches of all roles it serves; a text when that was not kept."""
        lost = f"tokens of step {step}, which follows the last kept checkpoint"
        settings, batches = None, []
        try:
            for served in self._config.roles_of(role):
                record = self._recording.steps.get((served, step))
                if record is None:
                    return lost
                body = record.body()
                batch, whole = self._build(served, step, body)
                if batch is None or not whole:
                    return lost
                settings = body.settings
                batches.append(batch)
        except CorruptionError as error:
            return str(error)
        assert settings is not None, "a role serves itself"
        if settings.ranks > 1:  # a sum over ranks is rounded otherwise than the same sum in one process
            return f"{settings.ranks} ranks took step {step}; one process can rebuild it only nearly"
        return settings, batches

    def _checkpoint(self, role: str, step: int) -> Checkpoint | None:
        """The newest intact kept checkpoint with no step beyond `step` in it."""
        try:
            return latest_checkpoint(self._folders(role) / "record" / "checkpoints", upto=step)
        except CorruptionError:  # every one is damaged: from the start, as without any
            return None

    def _learner(self, role: str, checkpoint: Checkpoint | None, shares: bool) -> Learner:
        """shares: whether the policy computes prefixes once, in these steps."""
        agent = self._config.agents[role]
        start = Path(agent.model) if agent.model else self._folders(role) / "start"
        policy = load_policy(start, agent.policy.model_copy(update={"share_prefixes": shares}))
        reference = load_reference(policy, start) if find_loss(agent.loss).needs_reference else None
        learner = new_learner(agent, policy, reference)
        if checkpoint is not None:
            restore_checkpoint(checkpoint, learner.policy, learner.optimizer)
        return learner

    def _in_the_other_way(self, role: str, learner: Learner, shares: bool) -> Learner:
        """The learner with its weights and its optimizer, and a policy that shares prefixes or does not."""
        other = self._learner(role, None, shares)
        other.policy.model.load_state_dict(learner.policy.model.state_dict())
        other.optimizer.load_state_dict(learner.optimizer.state_dict())
        return other


STAGES = ("reward", "advantage", "alignment", "batch", "loss")
_Pair = tuple[str, Any, Any, int, int]  # label, recorded row, rebuilt row, and the numbers of both


class _RecordedTokens:
    """Stands in for the trajectory log. A trajectory without recorded tokens gets blank ones of its length: enough for
    everything before the batch."""

    def __init__(self) -> None:
        self._known: list[tuple[str, int, TrajectoryRecord]] = []
        self.whole = True

    def add(self, query: str, rollout: int, record: TrajectoryRecord) -> LogRef:
        self._known.append((query, rollout, record))
        return LogRef(record.role, 0, len(self._known) - 1, record.n, 0)

    def read(self, ref: LogRef) -> Trajectory:
        query, rollout, record = self._known[ref.offset]
        if record.tokens:
            return record.trajectory(query, rollout)
        self.whole = False
        return Trajectory(
            query, rollout, record.role, record.invocation,
            np.zeros(record.n, np.int32), np.ones(record.n, np.uint8), np.zeros(record.n, np.float32),
            np.full(record.n, record.version_min, np.int32), segment_starts=record.segment_starts,
        )  # fmt: skip


def _claimed(
    config: RunConfig,
    role: str,
    query: str,
    index: int,
    rollouts: list[RecordedRollout],
    tokens: _RecordedTokens,
) -> ClaimedGroup:
    """A group as the store would deliver it to `role`."""
    ended, invocations = [], []
    weights = StageRewards(config).of_group(MAIN, index)
    for rollout in rollouts:
        head, body = rollout.head, rollout.body()
        main = next((t for t in body.trajectories if t.role == MAIN), None)
        scores, reward = (main.scores if main else {}), 0.0
        if head.status == "ok":
            reward = trajectory_reward(MAIN, weights, scores, head.correct)
        ended.append(
            ClaimedRollout(head.rollout, head.status, reward, head.correct, head.d_k, scores, -1, -1)
        )
        for t in body.trajectories:
            if t.role == role:
                ref = tokens.add(query, head.rollout, t)
                invocations.append(
                    ClaimedInvocation(
                        head.rollout, t.invocation, t.n, t.version_min, t.version_max, t.scores, ref
                    )
                )
    return ClaimedGroup(query, index, len(rollouts), {}, 0, {}, {}, ended, invocations, 0)


def _pairs(recorded: StepBody, rebuilt: StepBody, group: int, rollout: int) -> Iterator[_Pair]:
    """The trajectories of one rollout in both records; a row that only one of them has is paired with None."""
    sides: list[dict[int, tuple[int, npt.NDArray[np.void]]]] = []
    for body in (recorded, rebuilt):
        table = body.table()
        mine = np.flatnonzero((table["group"] == group) & (table["rollout"] == rollout))
        sides.append({int(table[i]["invocation"]): (int(i), table[i]) for i in mine})
    for invocation in sorted(set(sides[0]) | set(sides[1])):
        (i, a), (j, b) = (side.get(invocation, (-1, None)) for side in sides)
        yield f"invocation {invocation}", a, b, i, j


def _columns(pairs: list[_Pair], names: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    out: list[tuple[str, Any, Any]] = []
    for label, a, b, _, _ in pairs:
        if a is None or b is None:
            return [(label, a is not None, b is not None)]
        out += [(f"{name.removesuffix('_crc')} of {label}", a[name], b[name]) for name in names]
    return out


def _scores(recorded: StepBody, rebuilt: StepBody, pairs: list[_Pair]) -> list[tuple[str, Any, Any]]:
    out: list[tuple[str, Any, Any]] = []
    for label, a, b, i, j in pairs:
        if a is None or b is None:
            return [(label, a is not None, b is not None)]
        out.append(("correct", a["correct"], b["correct"]))
        mine, other = recorded.scores[i], rebuilt.scores[j]
        out += [(f"score {n} of {label}", mine.get(n), other.get(n)) for n in sorted(set(mine) | set(other))]
    return out


def _statistics(recorded: StepBody, rebuilt: StepBody, group: int) -> list[tuple[str, Any, Any]]:
    return [
        ("group mean", recorded.mean[group], rebuilt.mean[group]),
        ("group std", recorded.std[group], rebuilt.std[group]),
    ]


def _minibatches(recorded: StepBody, rebuilt: StepBody, number: int) -> list[tuple[str, Any, Any]]:
    a, b = recorded.minibatches[number], rebuilt.minibatches[number]
    crc: Mapping[str, int] = b.crc
    tokens = [(f"computed tokens of minibatch {number}", a.computed_tokens, b.computed_tokens)]
    return [
        ("denominator", a.denominator, b.denominator),
        *((f"{name} of minibatch {number}", value, crc.get(name)) for name, value in a.crc.items()),
        *(tokens if a.computed_tokens else ()),  # older records do not say
    ]


def _shared(recorded: StepBody, rebuilt: StepBody, pairs: list[_Pair]) -> list[tuple[str, Any, Any]]:
    """What was computed once; nothing in a step that shared nothing, as all of older records."""
    if not recorded.settings.share_prefixes:
        return []
    a, b = (np.frombuffer(body.shared, "<i4") for body in (recorded, rebuilt))
    return [(f"shared tokens of {label}", a[i], b[j]) for label, _, _, i, j in pairs]


def _same(a: Any, b: Any) -> bool:
    """Equal to the last bit; 0.0 and -0.0 differ, a NaN equals itself."""
    if a is None or b is None or isinstance(a, str | bool | list):
        return bool(a == b)
    return np.asarray(a).tobytes() == np.asarray(b, dtype=np.asarray(a).dtype).tobytes()
