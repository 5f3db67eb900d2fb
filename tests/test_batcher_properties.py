"""Properties of the batcher over generated workloads: it equals its twin, loses nothing, depends on nothing
hidden."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgrpo.batcher import Batcher
from tests.batcher_kit import assert_same, everything, everything_of_twin, make, replay, twin_of, workload

SEEDS = st.integers(0, 2**32 - 1)
MODES = st.sampled_from(["weights", "duplicate", "expected", "none"])


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    mode = draw(MODES)
    two_roles = draw(st.booleans())
    return {
        "k": draw(st.integers(1, 5)),
        "d_max": {"main": 1, "sub": draw(st.integers(1, 6))}
        if two_roles
        else {"sub": draw(st.integers(1, 6))},
        "capacity": draw(st.sampled_from([64, 96, 200])),
        "dp": draw(st.integers(1, 4)),
        "mode": mode,
        "sequence_weight": draw(st.sampled_from(["per_rollout", "per_invocation"]))
        if mode == "none"
        else "per_rollout",
        "empty": draw(st.sampled_from(["mask", "count"])),
        "overlong": draw(st.sampled_from(["truncate", "drop"])),
        "token_advantages": draw(st.booleans()),
        "cost": draw(st.sampled_from([(1.0, 0.0), (1.0, 2.0**-6), (0.5, 0.01)])),
        "max_segments": draw(st.sampled_from([None, 3, 8])),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options(), SEEDS, st.integers(0, 2**63), st.booleans())
def test_equals_the_twin(opts: dict[str, Any], seed: int, step: int, skip_zero: bool) -> None:
    """Plan and buffers are bit for bit those of the plain Python twin."""
    batcher = make(**opts)
    twin = twin_of(batcher)
    replay(workload(batcher, seed, queries=4), batcher, twin)
    assert batcher.ready() == twin.ready()
    assert_same(everything(batcher, step, skip_zero=skip_zero), everything_of_twin(twin, step, skip_zero))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options(), SEEDS, SEEDS, st.integers(1, 8))
def test_arrival_order_threads_and_state_do_not_matter(
    opts: dict[str, Any], seed: int, order: int, threads: int
) -> None:
    """Any permutation of the calls, any number of threads, a state round trip in the middle: the same bits."""
    reference = make(**opts, threads=1)
    calls = workload(reference, seed, queries=4)
    replay(calls, reference)
    r = np.random.default_rng(order)
    shuffled = [calls[i] for i in r.permutation(len(calls))]
    cut = int(r.integers(0, len(calls) + 1))
    first, second = make(**opts, threads=threads), make(**opts, threads=threads)
    replay(shuffled[:cut], first)
    second.load_state_dict(first.state_dict())
    replay(shuffled[cut:], first, second)
    expected = everything(reference, 7)
    assert_same(everything(first, 7), expected)
    assert_same(everything(second, 7), expected)
    assert second.counters == first.counters == reference.counters


def columns(calls: list[Any]) -> dict[str, Any]:
    """add() calls as the columns of add_many()."""
    rows = [args for name, args in calls if name == "add"]
    return {
        "queries": [a[0] for a in rows],
        "rollouts": np.array([a[1] for a in rows], np.int32),
        "invocations": np.array([a[2] for a in rows], np.int32),
        "traj_ids": np.array([a[3] for a in rows], np.int64),
        "offsets": np.cumsum([0, *(len(a[4]) for a in rows)]).astype(np.int64),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(a[4] for a in rows)]),
        "loss_mask": np.concatenate([np.zeros(0, np.uint8), *(a[5] for a in rows)]),
        "logprobs": np.concatenate([np.zeros(0, np.float32), *(a[6] for a in rows)]),
        "advantages": np.array([a[7] for a in rows], np.float32),
        "policy_versions": np.array([a[8] for a in rows], np.int32),
    }


@settings(max_examples=60, deadline=None)
@given(MODES, SEEDS, st.lists(st.integers(0, 60), max_size=4))
def test_splits_of_add_many_do_not_matter(mode: Any, seed: int, cuts: list[int]) -> None:
    """One call a trajectory or any split into columnar calls: the same bits."""
    one, many = make(mode=mode), make(mode=mode)
    calls = workload(one, seed)
    replay(calls, one)
    replay([c for c in calls if c[0] != "add"], many)
    adds = [c for c in calls if c[0] == "add"]
    bounds = sorted({0, len(adds), *(min(c, len(adds)) for c in cuts)})
    for low, high in itertools.pairwise(bounds):
        assert many.add_many(**columns(adds[low:high]), role="sub") == high - low
    assert_same(everything(many, 3), everything(one, 3))


def contents(batcher: Batcher, padded: bool) -> list[tuple[int, bytes, bytes, bytes]]:
    """(trajectory, tokens, masks, log-probs) of every segment in the buffers of all ranks."""
    plan = batcher.plan(5)
    assert plan.capacity == batcher.options["capacity"]  # the cap below is the one that was asked for
    found = []
    for rank in range(batcher.options["dp"]):
        if padded:
            for mb in range(plan.n_padded):
                b = plan.padded_buffers(rank, mb)
                batcher.write_padded(plan, rank, mb, b)
                for r, n in enumerate(b["lengths"]):
                    found.append((int(b["seg_traj"][r]), *(b[c][r, :n].tobytes() for c in COLUMNS)))
                assert b["ids"].size <= plan.capacity
        else:
            b = plan.buffers()
            batcher.write(plan, rank, b)
            for mb in range(plan.n_mb):
                for s in range(b["n_seg"][mb]):
                    low, high = b["cu_seqlens"][mb, s : s + 2]
                    assert high <= plan.capacity
                    found.append(
                        (int(b["seg_traj"][mb, s]), *(b[c][mb, low:high].tobytes() for c in COLUMNS))
                    )
                tail = b["cu_seqlens"][mb, b["n_seg"][mb]]
                assert not b["loss_mask"][mb, tail:].any()
    return sorted(found)


COLUMNS = ("ids", "loss_mask", "logprobs")


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    SEEDS,
    MODES,
    st.integers(1, 4),
    st.sampled_from([None, 2, 5]),
    st.sampled_from([90, 128]),
    st.floats(0, 6),
)
def test_no_token_is_lost_or_doubled(
    seed: int, mode: Any, dp: int, max_segments: int | None, capacity: int, mean: float
) -> None:
    """The buffers hold exactly the kept trajectories, each as often as planned, and no row exceeds the
    capacity."""
    batcher = make(mode=mode, dp=dp, max_segments=max_segments, capacity=capacity)
    calls = workload(batcher, seed, queries=3, mean=mean, longest=capacity)
    replay(calls, batcher)
    sent = {args[3]: args for name, args in calls if name == "add"}
    rows = batcher.plan(5).rows
    expected = []
    for traj_id, copies in zip(rows.traj_id.tolist(), rows.multiplicity.tolist(), strict=True):
        data = tuple(a.tobytes() for a in sent[traj_id][4:7])
        expected += [(traj_id, *data)] * (copies if mode == "duplicate" else 1)
    assert contents(batcher, padded=False) == sorted(expected)
    assert contents(batcher, padded=True) == sorted(expected)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.sampled_from(["weights", "duplicate", "expected", "none"]), st.integers(1, 8))
def test_every_rollout_weighs_the_same(seed: int, mode: Any, d_max: int) -> None:
    """Weights of a rollout sum to 1, slots and multiplicities agree."""
    batcher = make(mode=mode, d_max={"sub": d_max})
    replay(workload(batcher, seed), batcher)
    plan = batcher.plan(1)
    rows = plan.rows
    for g in range(len(plan.groups)):
        mine = rows.group == g
        for k in range(batcher.options["k"]):
            here = mine & (rows.rollout == k)
            if here.any():
                assert abs(rows.weight[here].sum() - 1) < 1e-12
    used = plan.slots[plan.slots >= 0]
    assert (np.bincount(used, minlength=plan.unique) == rows.multiplicity).all()
    assert plan.denominator == plan.n_rollouts == round(rows.weight.sum())
