"""From claimed groups to minibatches: credit -> alignment -> advantages -> right-padded rows of tokens.

Rewards and advantages are the algorithm's (mgrpo/algorithms), which sees the groups of one minibatch at a time with the
weights of their alignment. The batcher draws the same alignment and packs in C++; this file feeds it from the
trajectory log (memory to memory, token data never passes through Python objects) and wraps its buffers as tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from mgrpo.algorithms import GroupMember, GroupRollout, RolloutGroup, open_algorithm
from mgrpo.algorithms.statistics import LARGEST_REWARD, group_statistics
from mgrpo.alignment import align
from mgrpo.batcher import Batcher, Plan
from mgrpo.config import RunConfig
from mgrpo.credit import StageRewards
from mgrpo.losses.registry import find_loss
from mgrpo.pipeline.batch_experts import experts_of_rows
from mgrpo.pipeline.batch_metrics import Member, batch_metrics, pool_metrics, sample_metrics
from mgrpo.store.records import ClaimedGroup, ClaimedInvocation
from mgrpo.trainers.batch import MicroBatch, MiniBatch
from mgrpo.trajectory_log.format import LogRef
from mgrpo.types import Float32, Trajectory

ARENA_BYTES = 1 << 30


class Trajectories(Protocol):
    """Where the tokens are: the trajectory log, or the record of a run that is replayed."""

    def read(self, ref: LogRef) -> Trajectory: ...


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one step trains on. A plan's traj_id is the number of its member; one plan and minibatch belong together.
    mean, std: weighted statistics of the kept rewards of each group; 0 where there are none. surplus: groups that were
    claimed with these and are not trained on."""

    step: int
    groups: Sequence[ClaimedGroup]
    mean: Sequence[float]
    std: Sequence[float]
    members: Sequence[Member]
    plans: Sequence[Plan]
    minibatches: Sequence[MiniBatch]
    metrics: dict[str, float]
    surplus: Sequence[ClaimedGroup] = ()


@dataclass(frozen=True, slots=True)
class ReadGroups:
    """Claimed groups of a step as the algorithm sees them (`scored`), and their trajectories, group after group."""

    step: int
    groups: Sequence[ClaimedGroup]
    scored: Sequence[RolloutGroup]
    members: Sequence[Member]


def merge_streams(batches: Sequence[StepBatch]) -> list[MiniBatch]:
    """The minibatches of one learner: those of all roles that share its policy, the i-th of each in one step. Their
    denominators add up, so that a token (or a sequence) weighs the same whichever role it belongs to."""
    return [
        MiniBatch([m for part in parts for m in part.micro], sum(part.denominator for part in parts))
        for parts in zip(*(batch.minibatches for batch in batches), strict=True)
    ]


class BatchBuilder:
    """Builds the minibatches of one role's steps."""

    def __init__(
        self,
        config: RunConfig,
        role: str,
        trajectory_log: Trajectories,
        ranks: int,
        shares_prefixes: bool = False,
    ) -> None:
        """ranks: processes of the trainer that the micro-batches are divided among. shares_prefixes: see the
        attribute."""
        self.shares_prefixes = shares_prefixes
        """Whether the trainer computes once what rows of a micro-batch begin with: then the micro-batches are packed by
        the tokens that are left. One whose rows are not divided among ranks may hold a prefix for several of them."""
        stages = range(config.task.last_stage + 1)
        self._of_stage = [open_algorithm(config, role, stage) for stage in stages]
        self._algorithm, self._rewards = self._of_stage[0], StageRewards(config)
        self._config, self._role, self._trajectories = config, role, trajectory_log
        self._agent = config.agents[role]
        self._ranks = ranks
        self._loss = find_loss(self._agent.loss, f"agents.{role}.loss")
        self._skip_zero = not self._loss.every_token_acts
        self._replays = config.agents[config.policy_of(role)].policy.routing_replay
        self._batcher = Batcher(
            config.trainer.group_size,
            self._agent.d_max,
            config.trainer.micro_batch,
            dp=self._ranks,
            role=role,
            mode=self._agent.alignment.mode,
            sequence_weight=self._agent.alignment.sequence_weight,
            token_advantages=self._algorithm.per_token,
            seed=config.seed,
            arena_bytes=ARENA_BYTES,
        )

    def build(self, step: int, groups: Sequence[ClaimedGroup]) -> StepBatch:
        """The minibatches of `step`, groups in order of their index, and what there is to say about them. With
        trainer.oversample the groups may be a step's whole pool, or those that were chosen from it."""
        return self.assemble(self.read(step, groups))

    def read(self, step: int, groups: Sequence[ClaimedGroup]) -> ReadGroups:
        """The groups of `step` in order of their index, with tokens, rewards and weights. Raises ValueError naming a
        trajectory that cannot be trained on, and CorruptionError."""
        groups = sorted(groups, key=lambda group: group.index)
        members: list[Member] = []
        scored = [self._score(step, groups, number, members) for number in range(len(groups))]
        return ReadGroups(step, groups, scored, members)

    def assemble(self, read: ReadGroups) -> StepBatch:
        """The minibatches of what was read: of the informative groups first where there are more than a step needs."""
        pool, informative = read, None
        if len(read.groups) > self._config.trainer.questions:
            informative = self._informative(read)
            read = self._chosen(read, informative)
        step, groups, members = read.step, read.groups, read.members
        size = len(groups) // self._config.trainer.minibatches
        numbers = iter(range(len(members)))
        plans = []
        for i in range(0, len(groups), size):
            part = read.scored[i : i + size]
            for seen, advantages in zip(part, self._advantages(part), strict=True):
                self._feed(seen, advantages, members, numbers)
            queries = [g.query for g in groups[i : i + size]]
            plans.append(self._plan(step, queries))
        minibatches = [self._minibatch(plan, members) for plan in plans]
        for group in groups:
            self._batcher.drop(group.query)
        metrics = {
            **sample_metrics(self._role, self._rewards, pool.groups, pool.members),
            **batch_metrics(step, plans, members),
        }
        if informative is not None:
            of_trained = sample_metrics(self._role, self._rewards, groups, members)
            metrics |= pool_metrics(informative, len(groups), of_trained)
        mean, std = group_statistics(read.scored)
        used = {group.query for group in groups}
        surplus = [group for group in pool.groups if group.query not in used]
        return StepBatch(step, groups, mean, std, members, plans, minibatches, metrics, surplus)

    def _plan(self, step: int, queries: Sequence[str]) -> Plan:
        shares = self.shares_prefixes
        return self._batcher.plan(
            step,
            queries=queries,
            skip_zero=self._skip_zero,
            share_prefixes=shares,
            hold_prefixes=shares and self._ranks == 1,
        )

    def _informative(self, pool: ReadGroups) -> list[bool]:
        """Of each group whether it teaches anything: some kept trajectory has an advantage other than 0, which is what
        the algorithm gives the pool."""
        return [
            any(
                member.weight > 0 and bool(np.any(np.where(member.loss_mask != 0, advantage, 0.0)))
                for member, advantage in zip(group.members, advantages, strict=True)
            )
            for group, advantages in zip(pool.scored, self._advantages(pool.scored), strict=True)
        ]

    def _chosen(self, pool: ReadGroups, informative: Sequence[bool]) -> ReadGroups:
        """A step's groups of a pool: the first informative ones, then the first of the others, in order of their index.
        Pure, so that a step that is taken again after a rollback chooses the same."""
        count = len(pool.groups)
        chosen = sorted(
            sorted(range(count), key=lambda n: not informative[n])[: self._config.trainer.questions]
        )
        number = {old: new for new, old in enumerate(chosen)}
        members = [replace(m, group=number[m.group]) for m in pool.members if m.group in number]
        groups, scored = [pool.groups[n] for n in chosen], [pool.scored[n] for n in chosen]
        return ReadGroups(pool.step, groups, scored, members)

    def _score(
        self, step: int, groups: Sequence[ClaimedGroup], number: int, members: list[Member]
    ) -> RolloutGroup:
        """One group as the algorithm sees it; its trajectories are added to `members`. A failed rollout has none, so it
        has no part in its group's statistics."""
        group = groups[number]
        first = len(members)
        algorithm = self._of_stage[self._config.stage_of(group.index)]
        rollouts = {
            r.rollout: GroupRollout(r.rollout, r.status == "ok", r.correct, r.reward, r.d_k)
            for r in group.rollouts
        }
        claimed = {r.rollout: r for r in group.rollouts if r.status == "ok"}
        counts = [0] * group.k
        for invocation in group.invocations:
            if invocation.rollout in claimed:
                counts[invocation.rollout] += 1
                reward = algorithm.reward(invocation.scores, rollouts[invocation.rollout])
                if not abs(reward) <= LARGEST_REWARD:
                    raise ValueError(
                        f"{self._name(group.query, invocation)}: reward {reward} is not within +-{LARGEST_REWARD:g}"
                    )
                tokens = self._tokens(step, group.query, invocation)
                members.append(Member(number, claimed[invocation.rollout], invocation, tokens, reward))
        alignment = self._agent.alignment
        aligned = align(
            counts, d_max=self._agent.d_max, seed=self._config.seed, step=step, query=group.query, role=self._role,
            mode=alignment.mode, sequence_weight=alignment.sequence_weight,
        )  # fmt: skip
        places = zip(aligned.rollout.tolist(), aligned.invocation.tolist(), strict=True)
        weights = dict(zip(places, aligned.weight.tolist(), strict=True))
        seen = [
            GroupMember(
                rollouts[m.invocation.rollout],
                m.invocation.invocation,
                m.invocation.scores,
                m.reward,
                weights.get((m.invocation.rollout, m.invocation.invocation), 0.0),
                m.trajectory.tokens,
                m.trajectory.loss_mask,
                m.trajectory.segment_starts,
            )
            for m in members[first:]
        ]
        return RolloutGroup(group.query, group.k, list(rollouts.values()), seen)

    def _tokens(self, step: int, query: str, invocation: ClaimedInvocation) -> Trajectory:
        if invocation.ref is None:
            raise ValueError(f"{self._name(query, invocation)} has no tokens")
        trajectory = self._trajectories.read(invocation.ref)
        # Admission and claims keep to the bound; a token beyond it would be a fault of theirs. After a rollback a token
        # may be of a version that this history has not reached yet.
        oldest, bound = trajectory.version_span()[0], self._config.trainer.max_lag
        if oldest >= 0 and step - oldest > bound:
            raise ValueError(
                f"{self._name(query, invocation)}: its oldest token is of version {oldest}, {step - oldest} steps "
                f"before step {step} that trains it; trainer.max_lag is {bound}"
            )
        return trajectory

    def _name(self, query: str, invocation: ClaimedInvocation) -> str:
        return f"{query}/{invocation.rollout}/{self._role}/{invocation.invocation}"

    def _advantages(self, groups: Sequence[RolloutGroup]) -> Sequence[Sequence[float | Float32]]:
        """What the algorithm gives the groups of one minibatch. Raises ValueError for too many or too few numbers."""
        found = self._algorithm.advantages(groups)
        given, wanted = [len(a) for a in found], [len(g.members) for g in groups]
        if given != wanted:
            name = type(self._algorithm).__name__
            raise ValueError(f"{name}.advantages() gave {given} numbers for groups of {wanted} trajectories")
        return found

    def _feed(
        self,
        group: RolloutGroup,
        advantages: Sequence[float | Float32],
        members: Sequence[Member],
        numbers: Iterator[int],
    ) -> None:
        """One group into the batcher. numbers: those of its members."""
        counts = dict.fromkeys(range(group.k), 0)
        per_token = self._algorithm.per_token
        for seen, advantage in zip(group.members, advantages, strict=True):
            number = next(numbers)
            trajectory = members[number].trajectory
            counts[seen.rollout.rollout] += 1
            self._batcher.add(
                group.query,
                seen.rollout.rollout,
                seen.invocation,
                number,
                trajectory.tokens,
                trajectory.loss_mask,
                trajectory.logprobs,
                np.ascontiguousarray(advantage, np.float32) if per_token else float(advantage),
                members[number].invocation.version_min,
                segment_starts=trajectory.segment_starts,
            )
        for k, d in counts.items():
            self._batcher.seal(group.query, k, d)

    def _minibatch(self, plan: Plan, members: Sequence[Member]) -> MiniBatch:
        """Write the plan's rows; the denominator counts every kept trajectory, rows without a gradient included.

        With several ranks micro-step after micro-step, each with one micro-batch a rank, some of them empty.
        """
        micro: list[MicroBatch] = []
        prefixes: dict[int, torch.Tensor] = {}
        for index in range(plan.n_padded):
            step = [self._micro_batch(plan, rank, index, members) for rank in range(self._ranks)]
            if (number := int(plan.prefix_id[0, index])) >= 0:  # one tensor for all micro-batches with it
                prefix = step[0].ids[0, : plan.prefixes[0, index]]
                step[0].prefix = prefixes.setdefault(number, prefix)
            if any(len(m.lengths) for m in step):
                micro += step
        return MiniBatch(micro, self._denominator(plan))

    def _micro_batch(self, plan: Plan, rank: int, index: int, members: Sequence[Member]) -> MicroBatch:
        buffers = plan.padded_buffers(rank, index)
        self._batcher.write_padded(plan, rank, index, buffers)
        rows = buffers["lengths"] > 0
        return MicroBatch(
            ids=torch.from_numpy(buffers["ids"][rows].astype(np.int64)),
            loss_mask=torch.from_numpy(buffers["loss_mask"][rows] != 0),
            rollout_logprobs=torch.from_numpy(buffers["logprobs"][rows]),
            lengths=torch.from_numpy(buffers["lengths"][rows].astype(np.int64)),
            advantages=torch.from_numpy(buffers["seg_advantage"][rows]),
            weights=torch.from_numpy(buffers["seg_weight"][rows]),
            token_advantages=torch.from_numpy(buffers["advantages"][rows])
            if "advantages" in buffers
            else None,
            experts=experts_of_rows(plan, buffers, members) if self._replays else None,
        )

    def _denominator(self, plan: Plan) -> float:
        return self._loss.denominator(plan.denominator, plan.weighted_tokens)
