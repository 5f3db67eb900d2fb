"""What there is to say about a step's data before anything is learned from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgrpo.batcher import Plan
from mgrpo.credit import StageRewards, is_gated
from mgrpo.store.records import ClaimedGroup, ClaimedInvocation, ClaimedRollout
from mgrpo.types import MAIN, Trajectory


@dataclass(frozen=True, slots=True)
class Member:
    """One trajectory of a step: where it comes from and what it is worth. group: index into StepBatch.groups."""

    group: int
    rollout: ClaimedRollout
    invocation: ClaimedInvocation
    trajectory: Trajectory
    reward: float


def sample_metrics(
    role: str, rewards_of: StageRewards, groups: Sequence[ClaimedGroup], members: Sequence[Member]
) -> dict[str, float]:
    """Of all groups that were sampled for a step: rewards of the role's trajectories, outcomes, failures and calls."""
    finished = [r for g in groups for r in g.rollouts if r.status == "ok"]
    mine = [i for g in groups for i in g.invocations]
    rewards = [m.reward for m in members]
    out = {
        "reward/mean": _mean(rewards),
        "reward/std": float(np.std(rewards)) if rewards else 0.0,
        "reward/correct": _mean([r.correct for r in finished]),
        "reward/gated": _mean(
            [is_gated(rewards_of.of_group(role, g.index), i.scores) for g in groups for i in g.invocations]
        ),
        "rollouts/failed": float(sum(r.status != "ok" for g in groups for r in g.rollouts)),
    }
    for name in sorted({name for i in mine for name in i.scores}):
        out[f"reward/{name}"] = _mean([i.scores[name] for i in mine if name in i.scores])
    if role != MAIN:
        counts = [r.d_k.get(role, 0) for r in finished]
        out |= {"d_k/mean": _mean(counts), "d_k/max": float(max(counts, default=0))}
    return out


def batch_metrics(step: int, plans: Sequence[Plan], members: Sequence[Member]) -> dict[str, float]:
    """Of what a step trains on: alignment, rows without a gradient, tokens, and how old these are."""
    kept = np.concatenate([_with_gradient(p) for p in plans])
    copies = np.concatenate([p.multiplicity for p in plans])
    return {
        "advantage/frac_zero": float((~kept).mean()) if kept.size else 1.0,
        "align/dup_ratio": float((copies - 1).clip(0).sum() / max(1, copies.sum())),
        "align/drop_ratio": 1.0 - kept.size / max(1, len(members)),
        "tokens": float(sum(m.invocation.n_tokens for m in members)),
        **staleness_metrics(step, members),
    }


def _with_gradient(plan: Plan) -> npt.NDArray[np.bool_]:
    """(U,) of each kept trajectory whether some of its rows has a gradient."""
    rows, first = plan.rows, plan.rows.first()
    return np.logical_or.reduceat(rows.has_gradient, first) if len(first) else rows.has_gradient


def pool_metrics(
    informative: Sequence[bool], trained: int, of_trained: Mapping[str, float]
) -> dict[str, float]:
    """Of a step's choice among more groups than it needs. informative: of each group it has seen; of_trained: the
    sample_metrics of the `trained` groups that it took, whose rewards are no fair sample any more."""
    out = {f"trained/{name}": value for name, value in of_trained.items() if name.startswith("reward/")}
    return out | {
        "oversample/seen": float(len(informative)),
        "oversample/informative": float(sum(informative)),
        "oversample/surplus": float(len(informative) - trained),
    }


def staleness_metrics(step: int, members: Sequence[Member]) -> dict[str, float]:
    """Steps between the versions that sampled and the one that trains: mean and max of the sampled tokens; age, the
    mean over trajectories of that of its oldest token; mixed, the share of trajectories sampled with several versions.
    """
    sampled = [m.trajectory.versions[m.trajectory.versions >= 0] for m in members]
    sampled = [versions for versions in sampled if versions.size]
    if not sampled:
        return {f"staleness/{name}": 0.0 for name in ("mean", "max", "age", "mixed")}
    oldest = np.array([versions.min() for versions in sampled])
    newest = np.array([versions.max() for versions in sampled])
    return {
        "staleness/mean": step - float(np.concatenate(sampled).mean()),
        "staleness/max": float(step - oldest.min()),
        "staleness/age": step - float(oldest.mean()),
        "staleness/mixed": float((oldest != newest).mean()),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
