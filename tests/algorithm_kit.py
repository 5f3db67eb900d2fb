"""Rollout groups made by hand, and algorithms opened without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mgrpo.algorithms.base import Algorithm, GroupMember, GroupRollout, RolloutGroup
from mgrpo.algorithms.registry import BUILT_IN, GROUP
from mgrpo.config.algorithm import AlgorithmConfig
from mgrpo.config.reward import RewardConfig
from mgrpo.plugins import find_class

Call = tuple[int, float, float]
"""(rollout, reward, weight) of one trajectory."""


def algorithm(kind: str, role: str = "sub", **settings: Any) -> Algorithm:
    """A built-in kind with these settings."""
    section: Any = TypeAdapter(AlgorithmConfig).validate_python({"type": kind, **settings})
    found = find_class("type", kind, BUILT_IN, GROUP, Algorithm)  # type: ignore[type-abstract]
    return found(section, role, RewardConfig.model_validate({"gate": False, "outcome": 1.0}))


def member(
    rollout: GroupRollout,
    invocation: int,
    reward: float,
    weight: float = 1.0,
    turns: Sequence[Any] = ((0,), (1,)),
) -> GroupMember:
    """turns: stretches of token ids, what the policy saw and what it sampled in turn."""
    tokens = np.concatenate([np.array(t, np.int32) for t in turns])
    mask = np.concatenate([np.full(len(t), i % 2, np.uint8) for i, t in enumerate(turns)])
    return GroupMember(rollout, invocation, {}, reward, weight, tokens, mask)


def group(query: str, k: int, calls: Sequence[Call], failed: Sequence[int] = ()) -> RolloutGroup:
    """K rollouts with these calls of role "sub"; a rollout's own reward and outcome are its number."""
    counts = [sum(k_ == number for k_, _, _ in calls) for number in range(k)]
    rollouts = [
        GroupRollout(n, False, 0.0, 0.0, {}) if n in failed else GroupRollout(n, True, n, n, {"sub": d})
        for n, d in enumerate(counts)
    ]
    seen: dict[int, int] = {}
    members = []
    for number, reward, weight in calls:
        seen[number] = seen.get(number, -1) + 1
        members.append(member(rollouts[number], seen[number], reward, weight))
    return RolloutGroup(query, k, rollouts, members)


def random_groups(seed: int, k: int = 6, d_max: int = 4, n: int = 5) -> list[RolloutGroup]:
    """Poisson d_k, rollouts without a call and failed ones, trajectories that the draw dropped, coarse rewards, a group
    of equal rewards, one of a single trajectory and one without any."""
    r = np.random.default_rng(seed)
    groups = [group("empty", k, []), group("one", k, [(2, 0.7, 1.0)])]
    groups.append(group("equal", k, [(i % k, 0.1 + 0.2, 1 / d_max) for i in range(5)] + [(5, 0.3, 1.0)]))
    for q in range(n):
        failed = [int(x) for x in np.flatnonzero(r.random(k) < 0.15)]
        calls: list[Call] = []
        for rollout in range(k):
            d = 0 if rollout in failed else int(r.poisson(2))
            copies = r.multinomial(d_max, np.full(d, 1 / d)) if d else []
            calls += [(rollout, float(r.choice([0.0, 0.1, 0.35, 0.6, 1.0])), m / d_max) for m in copies]
        groups.append(group(f"g{q}", k, calls, failed))
    return groups


def flat(groups: Sequence[RolloutGroup], advantages: Sequence[Sequence[Any]]) -> list[float]:
    """Advantages of the kept members, group after group."""
    return [
        float(a)
        for g, row in zip(groups, advantages, strict=True)
        for m, a in zip(g.members, row, strict=True)
        if m.weight > 0
    ]


def weighted(members: Sequence[GroupMember]) -> Mapping[str, float]:
    """Mean and deviation of the kept members' rewards, in plain Python."""
    kept = [m for m in members if m.weight > 0]
    total = sum(m.weight for m in kept)
    mean = sum(m.weight * m.reward for m in kept) / total
    return {
        "mean": mean,
        "std": (sum(m.weight * (m.reward - mean) ** 2 for m in kept) / total) ** 0.5,
        "total": total,
        "low": min(m.reward for m in kept),
        "high": max(m.reward for m in kept),
    }
