"""What the store's tests share: a small run, its processes, and trajectories made from their identity."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np

import mgrpo
from mgrpo.store.records import ClaimedGroup, RunParams
from mgrpo.store.trainer_client import TrainerClient
from mgrpo.store.worker_client import WorkerClient
from mgrpo.types import Trajectory

DIGEST = "digest-1"


def run_params(**changes: object) -> RunParams:
    """Two training roles, two rollouts a group, two groups a step."""
    values = {
        "run": "run-1", "digest": DIGEST, "roles": ["main", "sub"], "training_roles": ["main", "sub"],
        "k": 2, "batch": 2, "max_lag": 0,
    }  # fmt: skip
    return RunParams(**(values | changes))  # type: ignore[arg-type]


def make_trajectory(query: str, rollout: int, role: str, invocation: int, n: int = 40) -> Trajectory:
    """Content that is a function of the identity."""
    rng = np.random.default_rng(abs(hash((rollout, role, invocation))) % 2**32)
    return Trajectory(
        query=query,
        rollout=rollout,
        role=role,
        invocation=invocation,
        tokens=rng.integers(0, 1000, n).astype(np.int32),
        loss_mask=rng.integers(0, 2, n).astype(np.uint8),
        logprobs=-rng.random(n).astype(np.float32),
        versions=np.zeros(n, np.int32),
        scores={"format": 1.0},
    )


def same(a: Trajectory, b: Trajectory) -> bool:
    arrays = ("tokens", "loss_mask", "logprobs", "versions")
    keys = ("query", "rollout", "role", "invocation", "scores")
    return all(np.array_equal(getattr(a, x), getattr(b, x)) for x in arrays) and all(
        getattr(a, x) == getattr(b, x) for x in keys
    )


def publish(url: str, role: str, version: int = 0, checkpoint_step: int = -1) -> TrainerClient:
    """A trainer that has resumed and published."""
    trainer = mgrpo.connect(url, role=f"trainer:{role}", run=DIGEST)
    trainer.resume(checkpoint_step)
    trainer.status(version=version, step=checkpoint_step, checkpoint_step=checkpoint_step)
    return trainer


def fill(worker: WorkerClient, query: str, index: int, subs: int = 1) -> None:
    """Open a group and finish every rollout; rollout k has k * subs invocations of "sub"."""
    group = worker.open_group(query=query, k=2, d_max={"sub": 4}, index=index, policy={"main": 0, "sub": 0})
    for rollout in range(2):
        if rollout in group.finished:
            continue
        worker.invocation_done(group, rollout, role="main", n_tokens=5, versions=(0, 0))
        for invocation in range(rollout * subs):
            worker.invocation_done(
                group, rollout, role="sub", invocation=invocation, n_tokens=3, versions=(0, 0)
            )
        worker.rollout_final(group, rollout, reward=float(rollout), correct=1.0, d_k={"sub": rollout * subs})


def rss_mb(pid: int | str = "self") -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def queries(groups: list[ClaimedGroup]) -> list[str]:
    return [group.query for group in groups]
