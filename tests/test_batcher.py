"""Streaming, empty and overlong rules, roles, advantages and back-pressure of the batcher."""

from __future__ import annotations

import numpy as np
import pytest

from mgrpo.errors import ArenaFullError, TrajectoryError
from tests.batcher_kit import GOOD, assert_unchanged, fill, make, snapshot, tokens_of


def test_rows_without_a_gradient_can_be_left_out() -> None:
    """skip_zero keeps rows of advantage 0 in the plan and out of the micro-batches."""
    b = make()
    fill(b, {(0, 0): 0.0, (1, 0): -0.5, (1, 1): 0.0, (2, 0): 0.25})
    plan, lean = b.plan(0), b.plan(0, skip_zero=True)
    assert plan.rows.advantage.tolist() == [0.0, -0.5, 0.0, 0.25]
    assert plan.rows.has_gradient.tolist() == [False, True, False, True]
    assert lean.unique == plan.unique and lean.tokens == 8 < plan.tokens == 16


def test_advantages_of_tokens() -> None:
    """They are written with their tokens, packed and padded; a row's own is the mean over the trained tokens, and it
    has a gradient when one of those has; values under loss_mask 0 are not read."""
    mask = np.array([0, 1, 1, 0], np.uint8)
    cases = {  # token advantages -> (mean, has_gradient)
        (9.0, 1.0, -1.0, 9.0): (0.0, True),
        (9.0, 0.0, 0.0, 9.0): (0.0, False),
        (0.0, 0.5, 1.0, 0.0): (0.75, True),
    }
    b = make(token_advantages=True, dp=1)
    for k, given in enumerate(cases):
        ids, logprobs = np.full(4, k, np.int32), np.zeros(4, np.float32)
        b.add("q", k, 0, k, ids, mask, logprobs, np.array(given, np.float32), 0)
    for k in range(4):
        b.seal("q", k, int(k < 3))
    plan = b.plan(0)
    assert list(zip(plan.rows.advantage.tolist(), plan.rows.has_gradient.tolist(), strict=True)) == list(
        cases.values()
    )
    padded, packed = plan.padded_buffers(0, 0), plan.buffers(advantages=True)
    b.write_padded(plan, 0, 0, padded)
    b.write(plan, 0, packed)
    assert {
        int(i[0]): tuple(a) for i, a in zip(padded["ids"], padded["advantages"].tolist(), strict=True)
    } == dict(enumerate(cases))
    assert packed["advantages"][0, :12].tolist() == [x for given in cases for x in given]
    assert b.plan(0, skip_zero=True).tokens == 8
    with pytest.raises(TrajectoryError, match="4 tokens, 3 advantages"):
        b.add("r", 0, 0, 9, ids, mask, logprobs, np.zeros(3, np.float32), 0)
    with pytest.raises(TrajectoryError, match="advantage nan at 1 is not finite"):
        b.add("r", 0, 0, 9, ids, mask, logprobs, np.array([0, np.nan, 0, 0], np.float32), 0)
    with pytest.raises(TrajectoryError, match="advantage is not a numpy array"):
        b.add("r", 0, 0, 9, ids, mask, logprobs, 0.5, 0)
    again = np.array([9.0, 1.0, -1.0, 9.0], np.float32)
    assert not b.add("q", 0, 0, 0, np.zeros(4, np.int32), mask, logprobs, again, 0)
    for n in (4, 90):  # as long with other advantages, and longer
        columns = (np.zeros(n, np.int32), np.ones(n, np.uint8), np.zeros(n, np.float32))
        with pytest.raises(TrajectoryError, match="already here as trajectory 0 with other content"):
            b.add("q", 0, 0, 0, *columns, np.ones(n, np.float32), 0)
    assert b.used_bytes == 3 * 16 * 13


def test_rollouts_without_invocations() -> None:
    """mask: they leave the denominator; count: they stay in it; error: refused; a whole group of them is
    harmless."""
    for empty, denominator in (("mask", 2), ("count", 8)):
        b = make(empty=empty)
        fill(b, {}, "nobody")
        fill(b, {(0, 0): 1.0, (2, 0): 0.0, (2, 1): 1.0}, "some")
        plan = b.plan(0)
        assert b.ready() == ["nobody", "some"]
        assert plan.denominator == denominator and plan.n_rollouts == 2
        assert plan.group_rollouts.tolist() == [0, 2]
        assert (plan.slots[0] == -1).all() and (plan.slots[1][[1, 3]] == -1).all()
        empty_plan = b.plan(0, queries=["nobody"])
        assert empty_plan.n_mb == empty_plan.n_padded == empty_plan.tokens == 0
        b.write(empty_plan, 0, empty_plan.buffers())
    b = make(empty="error")
    with pytest.raises(TrajectoryError, match="empty='error'") as caught:
        b.seal("q", 0, 0)
    assert caught.value.kind == "empty_rollout" and len(b) == 0


def test_overlong_rules() -> None:
    """error refuses, truncate keeps the first tokens, drop takes the trajectory out of its group."""
    data = tokens_of(100, 1)
    for rule in ("truncate", "drop"):
        b = make(overlong=rule)
        b.add("q", 0, 0, 1, *data, 1.0, 0)
        b.add("q", 0, 1, 2, *tokens_of(5, 2), 0.0, 0)
        assert not b.add("q", 0, 0, 1, *data, 1.0, 0)
        for k, d in enumerate((2, 0, 0, 0)):
            b.seal("q", k, d)
        rows = b.plan(0).rows
        if rule == "truncate":
            assert rows.length.tolist() == [96, 5] and b.counters["truncated"] == 1
            assert rows.active[0] == data[1][:96].sum()
        else:
            assert rows.traj_id.tolist() == [2] and b.counters["overlong"] == 1
            assert rows.weight.tolist() == [1.0]
    b = make(overlong="truncate")
    mask = np.zeros(100, np.uint8)
    mask[99] = 1
    with pytest.raises(TrajectoryError) as caught:
        b.add("q", 0, 0, 1, data[0], mask, data[2], 1.0, 0)
    assert caught.value.kind == "no_trainable"


def test_roles_have_their_own_depth() -> None:
    """One batcher for main and two sub-agent roles: a query waits for all."""
    b = make(d_max={"main": 1, "coder": 2, "search": 3}, k=2)
    with pytest.raises(ValueError, match="name the role"):
        b.seal("q", 0, 1)
    traj_id = 0
    for role, counts in (("main", (1, 1)), ("coder", (3, 0)), ("search", (1, 2))):
        assert b.ready() == []
        for k, d in enumerate(counts):
            b.seal("q", k, d, role)
            for i in range(d):
                traj_id += 1
                b.add("q", k, i, traj_id, *tokens_of(6, traj_id), float(traj_id), 0, role)
    plan = b.plan(0)
    assert plan.groups == [("q", "main"), ("q", "coder"), ("q", "search")]
    assert plan.slots.shape == (3, 2, 3)
    assert (plan.slots >= 0).sum(-1).tolist() == [[1, 1], [2, 0], [3, 3]]
    assert plan.group_rollouts.tolist() == [2, 1, 2]


def test_a_failed_invocation_shrinks_its_rollout() -> None:
    """An infrastructure failure is not a reward of 0: the others share the rollout's weight."""
    b = make(mode="none")
    b.add("q", 0, 1, 1, *tokens_of(5, 1), 1.0, 0)
    b.fail("q", 0, 0)
    b.seal("q", 0, 2)
    for k in (1, 2, 3):
        b.seal("q", k, 0)
    assert b.plan(0).rows.weight.tolist() == [1.0] and b.plan(0).rows.invocation.tolist() == [1]


def test_groups_stream_in_and_out() -> None:
    """ready() follows the seals; drop frees; expire takes only what is old and incomplete; ids come free
    again."""
    now = [0.0]
    b = make(clock=lambda: now[0])
    fill(b, {(0, 0): 1.0}, "2/10")
    now[0] = 50.0
    fill(b, {(0, 0): 1.0}, "2/9")
    b.add(**GOOD)
    assert b.ready() == ["2/9", "2/10"] and len(b) == 3
    assert b.expire(10.0) == []
    now[0] = 100.0
    assert b.expire(10.0) == ["7/2"] and len(b) == 2 and b.counters["expired"] == 1
    assert b.drop("2/9") and not b.drop("2/9") and b.drop("2/10")
    assert b.used_bytes == 0 and len(b) == 0
    assert b.add(**GOOD)
    with pytest.raises(ValueError, match="8 groups, 0 are ready"):
        b.plan(0, 8)
    with pytest.raises(ValueError, match="query 7/2 is not ready: 0 of 4"):
        b.plan(0, queries=["7/2"])
    with pytest.raises(ValueError, match="query nope is not in"):
        b.plan(0, queries=["nope"])


def test_a_full_arena_pushes_back_and_recovers() -> None:
    """ArenaFullError without growth; room scattered by drops is found again by compaction."""
    b = make(arena_bytes=9 * 16 * 64, capacity=1024, k=1)
    for q in range(64):
        b.add(q, 0, 0, q, *tokens_of(16, q), 1.0, 0)
        b.seal(q, 0, 1)
    before = snapshot(b)
    with pytest.raises(ArenaFullError, match="1024 of 1024 tokens") as caught:
        b.add("new", 0, 0, 99, *tokens_of(16, 99), 1.0, 0)
    assert caught.value.kind == "arena_full" and caught.value.query == "new"
    assert_unchanged(b, before)
    for q in range(0, 64, 2):
        b.drop(q)
    with pytest.raises(ArenaFullError):
        b.add("new", 0, 0, 99, *tokens_of(513, 99), 1.0, 0)
    b.add("new", 0, 0, 99, *tokens_of(512, 99), 1.0, 0)
    b.seal("new", 0, 1)
    plan = b.plan(0)
    for rank in range(2):
        out = plan.buffers()
        b.write(plan, rank, out)
        for mb in range(plan.n_mb):
            for s in range(out["n_seg"][mb]):
                here = slice(*out["cu_seqlens"][mb, s : s + 2])
                ids = tokens_of(here.stop - here.start, int(out["seg_traj"][mb, s]))[0]
                assert (out["ids"][mb, here] == ids).all()
