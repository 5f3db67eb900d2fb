"""Trajectories of several segments in the batcher: a row each, one weight among them, one content."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgrpo.batcher import Batcher
from mgrpo.errors import TrajectoryConflictError, TrajectoryError
from tests.batcher_kit import (
    GOOD,
    assert_same,
    assert_unchanged,
    everything,
    everything_of_twin,
    make,
    replay,
    snapshot,
    twin_of,
    workload,
)
from tests.test_batcher_properties import MODES, SEEDS, columns, contents, options


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options(), SEEDS, st.integers(0, 2**63), st.booleans())
def test_equals_the_twin(opts: dict[str, Any], seed: int, step: int, skip_zero: bool) -> None:
    """Plan and buffers are bit for bit those of the plain Python twin, whatever segments there are."""
    opts["capacity"] = min(opts["capacity"], 64)
    batcher = make(**opts)
    twin = twin_of(batcher)
    replay(workload(batcher, seed, queries=3, longest=200, segments=True), batcher, twin)
    assert batcher.ready() == twin.ready()
    assert_same(everything(batcher, step, skip_zero=skip_zero), everything_of_twin(twin, step, skip_zero))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options(), SEEDS, SEEDS, st.integers(1, 8))
def test_order_threads_state_and_redelivery_do_not_matter(
    opts: dict[str, Any], seed: int, order: int, threads: int
) -> None:
    """Any permutation of the calls, a state round trip in the middle, everything delivered twice: the same bits."""
    reference = make(**opts, threads=1)
    calls = workload(reference, seed, queries=3, longest=200, segments=True)
    replay(calls, reference)
    r = np.random.default_rng(order)
    shuffled = [calls[i] for i in r.permutation(len(calls))]
    cut = int(r.integers(0, len(calls) + 1))
    first, second = make(**opts, threads=threads), make(**opts, threads=threads)
    replay(shuffled[:cut], first)
    second.load_state_dict(first.state_dict())
    replay(shuffled[cut:], first, second)
    replay(shuffled, second)
    expected = everything(reference, 7)
    assert_same(everything(first, 7), expected)
    assert_same(everything(second, 7), expected)
    added = sum(name == "add" for name, _ in calls)
    assert second.counters == {**reference.counters, "redelivered": added}


@settings(max_examples=40, deadline=None)
@given(MODES, SEEDS)
def test_columns_carry_segments(mode: Any, seed: int) -> None:
    """add_many() with the starts of each trajectory leaves what add() leaves."""
    one, many = make(mode=mode), make(mode=mode)
    calls = workload(one, seed, segments=True)
    replay(calls, one)
    adds = [c for c in calls if c[0] == "add"]
    replay([c for c in calls if c[0] != "add"], many)
    many.add_many(**columns(adds), role="sub", segment_starts=[args[10] for _, args in adds])
    assert_same(everything(many, 3), everything(one, 3))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SEEDS, MODES, st.integers(1, 4), st.sampled_from([None, 2, 5]))
def test_no_token_of_a_trained_segment_is_lost_or_doubled(
    seed: int, mode: Any, dp: int, max_segments: int | None
) -> None:
    """The buffers hold exactly the segments with a trainable token of the kept trajectories, as often as planned; the
    weights of a trajectory's rows are equal and sum to its own, those of a rollout to 1."""
    batcher = make(mode=mode, dp=dp, max_segments=max_segments, capacity=96)
    calls = workload(batcher, seed, queries=3, segments=True)
    replay(calls, batcher)
    sent = {args[3]: args for name, args in calls if name == "add"}
    plan = batcher.plan(5)
    rows, first = plan.rows, plan.rows.first()
    expected = []
    for traj_id, copies in zip(rows.traj_id[first].tolist(), plan.multiplicity.tolist(), strict=True):
        args = sent[traj_id]
        mine = rows.traj_id == traj_id
        trained = []
        for number, (start, end) in enumerate(itertools.pairwise([*args[10], len(args[4])])):
            if args[5][start:end].any():
                trained.append(number)
                data = tuple(a[start:end].tobytes() for a in args[4:7])
                expected += [(traj_id, *data)] * (copies if mode == "duplicate" else 1)
        assert rows.segment[mine].tolist() == trained
        assert len(set(rows.weight[mine].tolist())) == len(set(rows.multiplicity[mine].tolist())) == 1
    assert contents(batcher, padded=False) == sorted(expected)
    assert contents(batcher, padded=True) == sorted(expected)
    cells, _ = np.unique(np.stack([rows.group, rows.rollout]), axis=1, return_inverse=True)
    for g, k in cells.T:
        assert abs(rows.weight[(rows.group == g) & (rows.rollout == k)].sum() - 1) < 1e-12
    used = np.bincount(plan.slots[plan.slots >= 0], minlength=len(rows.group))
    assert (used[first] == plan.multiplicity).all() and used.sum() == plan.multiplicity.sum()


def filled(batcher: Batcher, starts: tuple[int, ...], mask: tuple[int, ...], **more: Any) -> None:
    """One group of two rollouts: a trajectory of eight tokens with these segments, and a plain one."""
    n = len(mask)
    data = (np.arange(n, dtype=np.int32), np.array(mask, np.uint8), np.zeros(n, np.float32))
    batcher.add("q", 0, 0, 1, *data, more.get("advantage", 0.5), 0, segment_starts=starts)
    batcher.add("q", 1, 0, 2, *data, more.get("advantage", 0.5), 0)
    for k in range(2):
        batcher.seal("q", k, 1)


def test_a_segment_without_a_trainable_token_has_no_part() -> None:
    """It has no row, and the weight is divided among the others; the denominators are of rollouts and of tokens."""
    b = make(k=2, mode="none")
    filled(b, (0, 2, 5), (0, 1, 0, 0, 0, 0, 1, 1))
    plan = b.plan(0)
    assert plan.rows.segment.tolist() == [0, 2, 0] and plan.rows.weight.tolist() == [0.5, 0.5, 1.0]
    assert plan.rows.length.tolist() == [2, 3, 8] and plan.rows.active.tolist() == [1, 2, 3]
    assert (plan.denominator, plan.weighted_tokens, plan.unique, plan.n_rollouts) == (2, 4.5, 2, 2)
    assert plan.slots.tolist() == [[[0], [2]]]


def test_invocations_are_counted_once_whatever_their_segments() -> None:
    """The denominator of weights per invocation is their number, exactly."""
    b = make(k=2, mode="none", sequence_weight="per_invocation")
    filled(b, tuple(range(7)), (1,) * 7)
    plan = b.plan(0)
    assert plan.denominator == 2 and len(plan.rows.weight) == 8
    assert plan.rows.weight.tolist() == [1 / 7] * 7 + [1]


def test_a_segment_is_what_capacity_bounds() -> None:
    """Eight tokens fit into a capacity of four by segments; a longer segment is refused, cut, or takes its trajectory
    out of the group."""
    mask = (0, 1, 1, 1, 0, 1, 1, 1)
    plain = np.array([5, 6], np.int32), np.ones(2, np.uint8), np.zeros(2, np.float32)
    data = np.arange(8, dtype=np.int32), np.array(mask, np.uint8), np.zeros(8, np.float32)
    for overlong, starts, lengths in (
        ("error", (0, 4), [4, 4]), ("truncate", (0, 5), [4, 3]), ("drop", (0, 5), []), ("truncate", (0, 6), [4, 2]),
    ):  # fmt: skip
        b = make(k=1, capacity=4, overlong=overlong, dp=1)
        assert b.add("q", 0, 0, 1, *data, 0.5, 0, segment_starts=starts)
        assert not b.add("q", 0, 0, 1, *data, 0.5, 0, segment_starts=starts)
        b.add("q", 0, 1, 2, *plain, 0.5, 0)
        b.seal("q", 0, 2)
        assert b.plan(0).rows.length.tolist() == [*lengths, 2]
        assert b.counters["truncated"] == (overlong == "truncate")
        assert b.counters["overlong"] == (overlong == "drop")
        assert_same(everything(restored(b), 0), everything(b, 0))
    with pytest.raises(
        TrajectoryError, match=r"5 tokens of the segment at 0 are over the capacity of 4"
    ) as caught:
        make(k=1, capacity=4).add("q", 0, 0, 1, *data, 0.5, 0, segment_starts=(0, 5))
    assert caught.value.kind == "too_long"


def restored(batcher: Batcher) -> Batcher:
    options = {
        k: v for k, v in batcher.options.items() if k not in ("roles", "d_max", "max_segments", "vocab_size")
    }
    again = Batcher(d_max={"sub": 3}, **options)
    again.load_state_dict(batcher.state_dict())
    return again


def test_a_state_of_before_has_one_segment_each() -> None:
    """Without the columns of segments the trajectories load as they were saved."""
    b = make()
    replay(workload(b, 3), b)
    state = b.state_dict()
    assert set(state["segments"].tolist()) == {1} and not state["segment_starts"].any()
    del state["segments"], state["segment_starts"]
    again = make()
    again.load_state_dict(state)
    assert_same(everything(again, 1), everything(b, 1))
    for wrong in (
        {"segments": b.state_dict()["segments"][1:]},
        {"segment_starts": b.state_dict()["segment_starts"][1:]},
        {"segments": b.state_dict()["segments"] - 1},
    ):
        with pytest.raises(ValueError, match="segment"):
            make().load_state_dict({**b.state_dict(), **wrong})


@pytest.mark.parametrize("starts", [(1,), (0, 0), (0, 3), (0, 2, 1), (0, -1), (0, 1 << 40), (0, -(1 << 40))])
def test_starts_out_of_place_are_refused(starts: tuple[int, ...]) -> None:
    """They begin with 0 and rise below the number of tokens; a refused trajectory changes nothing."""
    b = make()
    b.add(**{**GOOD, "rollout": 3, "traj_id": 9}, segment_starts=(0, 1))
    before = snapshot(b)
    with pytest.raises(TrajectoryError, match="segment") as caught:
        b.add(**GOOD, segment_starts=starts)
    assert caught.value.kind == "segments"
    assert_unchanged(b, before)


def test_another_division_is_other_content() -> None:
    """The same tokens in other segments are no re-delivery."""
    b = make()
    assert b.add(**GOOD, segment_starts=(0, 1))
    assert not b.add(**GOOD, segment_starts=[0, 1])
    for starts in ((0,), (0, 2), (0, 1, 2)):
        with pytest.raises(TrajectoryConflictError, match="other content"):
            b.add(**GOOD, segment_starts=starts)
    b.drop(GOOD["query"])
    assert b.used_bytes == 0
    assert b.add(**GOOD) and not b.add(**GOOD)  # the arena's block is used again, its segments are not
    with pytest.raises(TrajectoryConflictError):
        b.add(**GOOD, segment_starts=(0, 1))
