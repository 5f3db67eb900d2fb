"""Workloads for the batcher's tests: a seeded list of calls, to be replayed in any order on a Batcher or its
twin."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from mgrpo.batcher import Batcher
from tests.batcher_twin import TwinBatcher, TwinPlan

Call = tuple[str, tuple[Any, ...]]

DEFAULTS: dict[str, Any] = {"k": 4, "d_max": {"sub": 3}, "capacity": 96, "dp": 2, "arena_bytes": 1 << 22}


GOOD: dict[str, Any] = {
    "query": "7/2",
    "rollout": 1,
    "invocation": 0,
    "traj_id": 41,
    "tokens": np.array([5, 6, 7], np.int32),
    "loss_mask": np.array([0, 1, 1], np.uint8),
    "logprobs": np.array([0, -1, -2], np.float32),
    "advantage": 0.5,
    "policy_version": 3,
}


def make(**options: Any) -> Batcher:
    return Batcher(**{**DEFAULTS, **options})


def twin_of(batcher: Batcher) -> TwinBatcher:
    return TwinBatcher(batcher.options)


def tokens_of(length: int, seed: int) -> tuple[Any, Any, Any]:
    """ids i32, loss_mask u8 with a trainable token, logprobs f32."""
    r = np.random.default_rng([length, seed])
    mask = r.integers(0, 2, length).astype(np.uint8)
    mask[-1] = 1
    return r.integers(0, 1000, length).astype(np.int32), mask, -r.random(length).astype(np.float32)


def workload(
    batcher: Batcher, seed: int, queries: int = 5, mean: float = 2.0, longest: int = 90, failures: float = 0.1,
    segments: bool = False,
) -> list[Call]:  # fmt: skip
    """Calls that complete `queries` groups: d_k is Poisson, advantages are coarse so that some are 0. segments: half of
    the trajectories have several, some of them without a trainable token."""
    r = np.random.default_rng(seed)
    calls: list[Call] = []
    traj_id = int(r.integers(0, 1000))
    for q in range(queries):
        name = f"{r.integers(0, 3)}/{q}"
        for role in batcher.roles:
            for k in range(batcher.options["k"]):
                d = int(r.poisson(mean))
                calls.append(("seal", (name, k, d, role)))
                for i in range(d):
                    if r.random() < failures:
                        calls.append(("fail", (name, k, i, role)))
                        continue
                    length = int(min(longest, 1 + r.geometric(0.05)))
                    starts = segment_starts(r, length) if segments else (0,)
                    per_token = batcher.options["token_advantages"]
                    advantage = r.choice([0.0, 0.0, -0.5, 0.7, 1.1], length if per_token else None)
                    advantage = advantage.astype(np.float32) if per_token else float(advantage)
                    if per_token and r.random() < 0.2:
                        advantage[:] = 0
                    data = tokens_of(length, traj_id)
                    if segments and length > 1 and r.random() < 0.3:
                        data[1][: length // 2] = 0
                        data[1][0] |= not trainable(data[1], starts, batcher.options["capacity"])
                    calls.append(
                        ("add", (name, k, i, traj_id, *data, advantage, int(r.integers(0, 9)), role, starts))
                    )
                    traj_id += int(r.integers(1, 5))
    return calls


def segment_starts(r: np.random.Generator, length: int) -> tuple[int, ...]:
    """Of a trajectory of so many tokens: one segment half of the time, else up to five."""
    if length < 2 or r.random() < 0.5:
        return (0,)
    return (0, *sorted({int(x) for x in r.integers(1, length, r.integers(1, 5))}))


def trainable(mask: Any, starts: tuple[int, ...], capacity: int) -> bool:
    """Whether a token is left to train on where each segment is cut at the capacity."""
    return any(
        mask[start : min(end, start + capacity)].any()
        for start, end in itertools.pairwise([*starts, len(mask)])
    )


def replay(calls: Iterable[Call], *batchers: Batcher | TwinBatcher) -> None:
    for name, args in calls:
        for b in batchers:
            getattr(b, name)(*args)


def everything(batcher: Batcher, step: int, **plan_options: Any) -> dict[str, Any]:
    """All bits of a plan and of its buffers on every rank, for comparisons."""
    plan = batcher.plan(step, **plan_options)
    out: dict[str, Any] = {f"rows.{name}": getattr(plan.rows, name) for name in plan.rows.__slots__}
    out |= {"slots": plan.slots, "shapes": plan.padded_shapes, "queries": np.array(plan.queries)}
    out |= {"rank_cost": plan.rank_cost, "lockstep": np.array(plan.lockstep)}
    for rank in range(batcher.options["dp"]):
        buffers = plan.buffers(advantages=True, position_ids=True)
        batcher.write(plan, rank, buffers)
        out |= {f"{rank}.{key}": value for key, value in buffers.items()}
        for mb in range(plan.n_padded):
            buffers = plan.padded_buffers(rank, mb)
            batcher.write_padded(plan, rank, mb, buffers)
            out |= {f"{rank}.{mb}.{key}": value for key, value in buffers.items()}
    return out


def everything_of_twin(twin: TwinBatcher, step: int, skip_zero: bool = False) -> dict[str, Any]:
    """As everything(), from the twin."""
    plan = twin.plan(step, twin.ready(), skip_zero)
    rows = plan.rows
    out: dict[str, Any] = {
        "rows.group": [r.group for r in rows],
        "rows.rollout": [r.rollout for r in rows],
        "rows.invocation": [r.invocation for r in rows],
        "rows.segment": [r.segment for r in rows],
        "rows.multiplicity": [r.multiplicity for r in rows],
        "rows.length": [r.item["length"] for r in rows],
        "rows.active": [int(r.item["mask"].sum()) for r in rows],
        "rows.policy_version": [r.item["version"] for r in rows],
        "rows.weight": [r.weight for r in rows],
        "rows.advantage": np.array([r.advantage for r in rows], np.float32),
        "rows.has_gradient": [bool((r.trained != 0).any()) for r in rows],
        "rows.traj_id": [r.item["id"] for r in rows],
        "slots": plan.slots,
        "queries": np.array(plan.queries),
        "rank_cost": plan.packing.rank_cost,
        "lockstep": plan.packing.lockstep,
    }
    dp = twin.o["dp"]
    out["shapes"] = np.array([[_shape(plan, step[rank]) for step in plan.padded] for rank in range(dp)])
    out["shapes"] = out["shapes"].reshape(dp, len(plan.padded), 2)
    for rank in range(dp):
        out |= {f"{rank}.{key}": value for key, value in plan.write(rank).items()}
        for mb in range(len(plan.padded)):
            out |= {f"{rank}.{mb}.{key}": value for key, value in plan.write_padded(rank, mb).items()}
    return out


def _shape(plan: TwinPlan, items: list[int]) -> tuple[int, int]:
    return len(items), plan.lengths[items[0]] if items else 0


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bit-equal, key by key."""
    assert a.keys() == b.keys()
    for key in a:
        x, y = np.asarray(a[key]), np.asarray(b[key])
        assert x.shape == y.shape, f"{key}: {x.shape} != {y.shape}"
        assert x.size == 0 or x.tobytes() == y.astype(x.dtype).tobytes(), f"{key}:\n{x}\n{y}"


def snapshot(batcher: Batcher) -> dict[str, Any]:
    state = batcher.state_dict()
    state["used"] = batcher.used_bytes
    return {key: value for key, value in state.items() if key != "ages"}


def assert_unchanged(batcher: Batcher, before: dict[str, Any]) -> None:
    after = snapshot(batcher)
    for key, value in before.items():
        assert np.array_equal(np.asarray(value), np.asarray(after[key])), key


def fill(b: Batcher, advantages: dict[tuple[int, int], float], query: str = "q", length: int = 4) -> None:
    """One group: (rollout, invocation) -> advantage; rollouts not named have d = 0."""
    for (k, i), advantage in advantages.items():
        traj_id = 1000 * len(b) + 10 * k + i
        b.add(query, k, i, traj_id, *tokens_of(length, traj_id), advantage, 0)
    for k in range(b.options["k"]):
        b.seal(query, k, sum(kk == k for kk, _ in advantages))
