"""From claimed groups to minibatches: credit -> group advantage -> alignment -> right-padded rows of tokens.

The batcher computes advantages, draw, weights and packing in C++; this file feeds it from the spool (memory to memory,
token data never passes through Python objects) and wraps its buffers as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from mgrpo.batcher import Batcher, Plan
from mgrpo.config import RunConfig
from mgrpo.credit import is_gated, trajectory_reward
from mgrpo.losses.registry import find_loss
from mgrpo.spool import SpoolRef
from mgrpo.store.records import ClaimedGroup, ClaimedInvocation, ClaimedRollout
from mgrpo.trainers.base import MicroBatch, MiniBatch
from mgrpo.types import MAIN, Trajectory

ARENA_BYTES = 1 << 30


class Trajectories(Protocol):
    """Where the tokens are: the spool, or the record of a run that is replayed."""

    def read(self, ref: SpoolRef) -> Trajectory: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One trajectory of a step: where it comes from and what it is worth. group: index into StepBatch.groups."""

    group: int
    rollout: ClaimedRollout
    invocation: ClaimedInvocation
    trajectory: Trajectory
    reward: float


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one step trains on. A plan's traj_id is the number of its member; one plan and minibatch belong together."""

    step: int
    groups: Sequence[ClaimedGroup]
    members: Sequence[Member]
    plans: Sequence[Plan]
    minibatches: Sequence[MiniBatch]
    metrics: dict[str, float]


def merge_streams(batches: Sequence[StepBatch]) -> list[MiniBatch]:
    """The minibatches of one learner: those of all roles that share its policy, the i-th of each in one step. Their
    denominators add up, so that a token (or a vote) weighs the same whichever role it belongs to."""
    return [
        MiniBatch([m for part in parts for m in part.micro], sum(part.denominator for part in parts))
        for parts in zip(*(batch.minibatches for batch in batches), strict=True)
    ]


class BatchBuilder:
    """Builds the minibatches of one role's steps."""

    def __init__(self, config: RunConfig, role: str, spool: Trajectories, ranks: int) -> None:
        """ranks: processes of the trainer that the micro-batches are dealt out to."""
        self._config, self._role, self._spool = config, role, spool
        self._agent = config.agents[role]
        self._ranks = ranks
        self._loss = find_loss(self._agent.loss, f"agents.{role}.loss")
        self._skip_zero = not self._loss.every_token_acts
        self._batcher = Batcher(
            config.trainer.group_size,
            self._agent.d_max,
            config.trainer.micro_batch,
            dp=self._ranks,
            role=role,
            mode=self._agent.alignment.mode,
            vote=self._agent.alignment.vote,
            estimator=self._agent.loss.estimator,
            eps=self._agent.loss.advantage_eps,
            seed=config.seed,
            arena_bytes=ARENA_BYTES,
        )

    def build(self, step: int, groups: Sequence[ClaimedGroup]) -> StepBatch:
        """The minibatches of `step`, groups in order of their index, and what there is to say about them."""
        groups = sorted(groups, key=lambda group: group.index)
        members: list[Member] = []
        for number in range(len(groups)):
            self._take(groups, number, members)
        size = len(groups) // self._config.trainer.minibatches
        plans = [
            self._batcher.plan(
                step, queries=[g.query for g in groups[i : i + size]], skip_zero=self._skip_zero
            )
            for i in range(0, len(groups), size)
        ]
        minibatches = [self._minibatch(plan) for plan in plans]
        for group in groups:
            self._batcher.drop(group.query)
        metrics = self._describe(step, groups, plans, [m.reward for m in members])
        return StepBatch(step, groups, members, plans, minibatches, metrics)

    def _take(self, groups: Sequence[ClaimedGroup], number: int, members: list[Member]) -> None:
        """Feed one group; a failed rollout has no trajectories, so it has no part in its group's statistics."""
        group = groups[number]
        first = len(members)
        rollouts = {r.rollout: r for r in group.rollouts if r.status == "ok"}
        counts = dict.fromkeys(range(group.k), 0)
        for invocation in group.invocations:
            rollout = rollouts.get(invocation.rollout)
            if rollout is None:
                continue
            counts[invocation.rollout] += 1
            members.append(self._member(number, group.query, rollout, invocation))
        if self._config.trainer.shuffle_rewards:
            members[first:] = self._shuffled(group, members[first:])
        for place, member in enumerate(members[first:], first):
            self._add(group.query, member, place)
        for k, d in counts.items():
            self._batcher.seal(group.query, k, d)

    def _member(
        self, number: int, query: str, rollout: ClaimedRollout, invocation: ClaimedInvocation
    ) -> Member:
        if invocation.ref is None:
            raise ValueError(
                f"{query}/{invocation.rollout}/{self._role}/{invocation.invocation} has no tokens"
            )
        reward = trajectory_reward(self._role, self._agent.reward, invocation.scores, rollout.correct)
        return Member(number, rollout, invocation, self._spool.read(invocation.ref), reward)

    def _shuffled(self, group: ClaimedGroup, members: Sequence[Member]) -> list[Member]:
        """The same trajectories with each other's rewards: a pure function of (seed, group, role)."""
        seed = [self._config.seed, group.index, self._config.roles.index(self._role)]
        order = np.random.default_rng(seed).permutation(len(members))
        return [replace(m, reward=members[i].reward) for m, i in zip(members, order, strict=True)]

    def _add(self, query: str, member: Member, number: int) -> None:
        self._batcher.add(
            query,
            member.invocation.rollout,
            member.invocation.invocation,
            number,
            member.trajectory.tokens,
            member.trajectory.loss_mask,
            member.trajectory.logprobs,
            member.reward,
            member.invocation.version_min,
        )

    def _minibatch(self, plan: Plan) -> MiniBatch:
        """Write the plan's rows; the denominator counts every kept trajectory, rows without a gradient included.

        With several ranks micro-step after micro-step, each with one micro-batch a rank, some of them empty.
        """
        micro = []
        for index in range(plan.n_padded):
            step = [self._micro_batch(plan, rank, index) for rank in range(self._ranks)]
            if any(len(m.lengths) for m in step):
                micro += step
        return MiniBatch(micro, self._denominator(plan))

    def _micro_batch(self, plan: Plan, rank: int, index: int) -> MicroBatch:
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
        )

    def _denominator(self, plan: Plan) -> float:
        return self._loss.denominator(plan.denominator, plan.weighted_tokens)

    def _describe(
        self, step: int, groups: Sequence[ClaimedGroup], plans: Sequence[Plan], rewards: Sequence[float]
    ) -> dict[str, float]:
        """Metrics of the step's data, before anything is learned from it."""
        finished = [r for g in groups for r in g.rollouts if r.status == "ok"]
        mine = [i for g in groups for i in g.invocations]
        kept = np.concatenate([p.rows.advantage for p in plans])
        copies = np.concatenate([p.rows.multiplicity for p in plans])
        versions = [i.version_min for i in mine if i.version_min >= 0]
        out = {
            "reward/mean": _mean(rewards),
            "reward/std": float(np.std(rewards)) if rewards else 0.0,
            "reward/correct": _mean([r.correct for r in finished]),
            "reward/gated": _mean([is_gated(self._agent.reward, i.scores) for i in mine]),
            "rollouts/failed": float(sum(r.status != "ok" for g in groups for r in g.rollouts)),
            "advantage/frac_zero": float((kept == 0).mean()) if kept.size else 1.0,
            "align/dup_ratio": float((copies - 1).clip(0).sum() / max(1, copies.sum())),
            "align/drop_ratio": 1.0 - kept.size / max(1, len(mine)),
            "staleness/mean": step - _mean(versions) if versions else 0.0,
            "staleness/max": float(step - min(versions)) if versions else 0.0,
            "tokens": float(sum(i.n_tokens for i in mine)),
        }
        for name in sorted({name for i in mine for name in i.scores}):
            out[f"reward/{name}"] = _mean([i.scores[name] for i in mine if name in i.scores])
        if self._role != MAIN:
            counts = [r.d_k.get(self._role, 0) for r in finished]
            out |= {"d_k/mean": _mean(counts), "d_k/max": float(max(counts, default=0))}
        return out


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
