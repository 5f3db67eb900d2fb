"""Errors, empty and overlong rules, roles, buffers, streaming, back-pressure and state of the batcher."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from mgrpo._C import pack
from mgrpo.batcher import Batcher
from mgrpo.errors import (
    ArenaFullError,
    ConflictError,
    TrajectoryError,
)
from tests.batcher_kit import assert_same, everything, make, replay, tokens_of, workload

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


def snapshot(batcher: Batcher) -> dict[str, Any]:
    state = batcher.state_dict()
    state["used"] = batcher.used_bytes
    return {key: value for key, value in state.items() if key != "ages"}


def assert_unchanged(batcher: Batcher, before: dict[str, Any]) -> None:
    after = snapshot(batcher)
    for key, value in before.items():
        assert np.array_equal(np.asarray(value), np.asarray(after[key])), key


BAD: list[tuple[dict[str, Any], str, type[Exception]]] = [
    (dict(zip(("tokens", "loss_mask", "logprobs"), tokens_of(97, 1), strict=True)), "too_long", ValueError),
    ({"tokens": np.zeros(0, np.int32), "loss_mask": np.zeros(0, np.uint8),
      "logprobs": np.zeros(0, np.float32)}, "empty", ValueError),
    ({"loss_mask": np.zeros(3, np.uint8)}, "no_trainable", ValueError),
    ({"loss_mask": np.array([0, 1, 2], np.uint8)}, "loss_mask", ValueError),
    ({"loss_mask": np.array([1, 1, 255] * 9, np.uint8), "tokens": np.zeros(27, np.int32),
      "logprobs": np.zeros(27, np.float32)}, "loss_mask", ValueError),
    ({"advantage": float("nan")}, "advantage", ValueError),
    ({"advantage": float("inf")}, "advantage", ValueError),
    ({"advantage": 1e39}, "advantage", ValueError),
    ({"advantage": "much"}, "dtype", TypeError),
    ({"advantage": np.zeros(3, np.float32)}, "dtype", TypeError),
    ({"logprobs": np.array([0, np.nan, 0], np.float32)}, "logprobs", ValueError),
    ({"logprobs": np.array([0, 0, -np.inf], np.float32)}, "logprobs", ValueError),
    ({"loss_mask": np.ones(2, np.uint8)}, "length", ValueError),
    ({"logprobs": np.zeros(4, np.float32)}, "length", ValueError),
    ({"tokens": np.array([5, -1, 7], np.int32)}, "token_id", ValueError),
    ({"tokens": np.array([5, 1000, 7], np.int32)}, "token_id", ValueError),
    ({"rollout": 4}, "rollout", ValueError),
    ({"rollout": -1}, "rollout", ValueError),
    ({"invocation": -1}, "invocation", ValueError),
    ({"traj_id": -1}, "id", ValueError),
    ({"rollout": 2, "invocation": 2}, "sealed", ConflictError),  # more invocations than sealed
    ({"rollout": 3, "traj_id": 77}, "duplicate", ConflictError),  # another trajectory at a taken place
    ({"rollout": 3, "advantage": 0.0, "traj_id": 9}, "duplicate", ConflictError),  # same id, other content
    ({"traj_id": 9}, "duplicate", ConflictError),  # same id, other place
    ({"tokens": np.zeros(3, np.int64)}, "dtype", TypeError),
    ({"tokens": [1, 2, 3]}, "dtype", TypeError),
    ({"tokens": np.zeros((3, 1), np.int32)}, "dtype", TypeError),
    ({"tokens": np.zeros(6, np.int32)[::2]}, "dtype", TypeError),
    ({"loss_mask": np.ones(3, bool)}, "dtype", TypeError),
    ({"logprobs": np.zeros(3, np.float64)}, "dtype", TypeError),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "error"), BAD)
def test_a_bad_trajectory_is_named_and_changes_nothing(
    change: dict[str, Any], kind: str, error: type[Exception]
) -> None:
    """Each rejection is typed, names query, rollout and trajectory, and leaves the batcher as it was."""
    b = make(vocab_size=1000)
    b.seal("7/2", 2, 2)
    b.add(**{**GOOD, "rollout": 3, "traj_id": 9})
    before = snapshot(b)
    args = {**GOOD, **change}
    with pytest.raises(TrajectoryError) as caught:
        b.add(**args)
    e = caught.value
    assert isinstance(e, error) and isinstance(e, ValueError | TypeError | ConflictError)
    assert (e.kind, e.query, e.rollout, e.trajectory) == (kind, "7/2", args["rollout"], args["traj_id"])
    assert all(str(part) in str(e) for part in ("7/2", args["rollout"], args["traj_id"]))
    assert_unchanged(b, before)
    assert pickle.loads(pickle.dumps(e)).kind == kind
    b.add(**GOOD)


def test_add_many_names_the_bad_one_and_keeps_those_before_it() -> None:
    """Of three trajectories in columns the second is refused: the error names it, the first stays, the third is not
    taken; columns that do not fit each other are refused as a whole."""
    data = [tokens_of(5, i) for i in range(3)]
    columns: dict[str, Any] = {
        "rollouts": np.array([0, 1, 2], np.int32),
        "invocations": np.zeros(3, np.int32),
        "traj_ids": np.array([7, 8, 9]),
        "offsets": np.array([0, 5, 10, 15]),
        "tokens": np.concatenate([d[0] for d in data]),
        "loss_mask": np.concatenate([d[1] for d in data]),
        "logprobs": np.concatenate([d[2] for d in data]),
        "advantages": np.array([0.0, np.nan, 1.0], np.float32),
        "policy_versions": np.zeros(3, np.int32),
    }
    b = make()
    with pytest.raises(TrajectoryError) as caught:
        b.add_many(["q", "q", "q"], **columns)
    assert (caught.value.kind, caught.value.query, caught.value.rollout, caught.value.trajectory) == (
        "advantage",
        "q",
        1,
        8,
    )
    assert b.counters["accepted"] == 1 and snapshot(b)["traj_ids"].tolist() == [7]
    before = snapshot(b)
    good = {**columns, "advantages": np.zeros(3, np.float32)}
    for change in (
        {"offsets": np.array([0, 5, 10])},
        {"offsets": np.array([0, 5, 10, 16])},
        {"offsets": np.array([0, 10, 5, 15])},
        {"traj_ids": np.array([8, 9])},
        {"tokens": columns["tokens"][:-1]},
        {"advantages": np.zeros(3)},
    ):
        with pytest.raises((ValueError, TypeError)):
            b.add_many(["q", "q", "q"], **{**good, **change})
        assert_unchanged(b, before)
    assert b.add_many(["q", "q", "q"], **good) == 2


def test_seal_and_fail_refuse_contradictions() -> None:
    """Sealed twice with another d, below what is here, out of range; a failure of what arrived."""
    b = make()
    b.add(**GOOD)
    b.add(**{**GOOD, "invocation": 2, "traj_id": 42})
    b.seal("7/2", 0, 2)
    b.seal("7/2", 0, 2)
    before = snapshot(b)
    for call, args, kind in [
        (b.seal, ("7/2", 0, 3), "sealed"),
        (b.seal, ("7/2", 1, 2), "sealed"),
        (b.seal, ("7/2", 4, 1), "rollout"),
        (b.seal, ("7/2", 1, -1), "sealed"),
        (b.fail, ("7/2", 1, 2), "duplicate"),
        (b.fail, ("7/2", 0, 2), "sealed"),
        (b.fail, ("7/2", 9, 0), "rollout"),
    ]:
        with pytest.raises(TrajectoryError) as caught:
            call(*args)
        assert caught.value.kind == kind
        assert_unchanged(b, before)
    with pytest.raises(ValueError, match="unknown role 'x'"):
        b.seal("7/2", 0, 2, role="x")


def test_redelivery_is_ignored_and_counted() -> None:
    """The same trajectory again is no error, also after the seal; another read of the same bytes counts as
    the same."""
    b = make()
    assert b.add(**GOOD)
    before = b.used_bytes
    assert not b.add(**{**GOOD, "tokens": GOOD["tokens"].copy()})
    b.seal("7/2", 1, 1)
    assert not b.add(**GOOD)
    assert b.counters["redelivered"] == 2 and b.counters["accepted"] == 1 and b.used_bytes == before
    b.fail("7/2", 0, 0)
    b.fail("7/2", 0, 0)
    assert b.counters["failed"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k=0"),
        ({"d_max": {"sub": 0}}, "'sub' is 0"),
        ({"d_max": {}}, "no role"),
        ({"capacity": 0}, "capacity=0"),
        ({"dp": 0}, "dp=0"),
        ({"mode": "some"}, "'some'"),
        ({"vote": "some"}, "'some'"),
        ({"empty": "some"}, "'some'"),
        ({"overlong": "some"}, "'some'"),
        ({"vote": "per_invocation"}, "per_invocation"),
        ({"cost": (0.0, 0.0)}, "cost="),
        ({"max_segments": 0}, "max_segments=0"),
        ({"threads": 0}, "threads=0"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"arena_bytes": 10}, "arena_bytes=10"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    """ValueError with the option and its value."""
    with pytest.raises(ValueError, match=words):
        make(**options)


def fill(b: Batcher, advantages: dict[tuple[int, int], float], query: str = "q", length: int = 4) -> None:
    """One group: (rollout, invocation) -> advantage; rollouts not named have d = 0."""
    for (k, i), advantage in advantages.items():
        traj_id = 1000 * len(b) + 10 * k + i
        b.add(query, k, i, traj_id, *tokens_of(length, traj_id), advantage, 0)
    for k in range(b.options["k"]):
        b.seal(query, k, sum(kk == k for kk, _ in advantages))


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
    """An infrastructure failure is not a reward of 0: the others share the rollout's vote."""
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


def test_buffers_are_checked_and_torch_shares_memory() -> None:
    """Wrong dtype, shape, layout, read-only, unknown and missing buffers are named; tensors are written in
    place."""
    b = make()
    replay(workload(b, 2), b)
    plan = b.plan(0)
    good = plan.buffers()
    for change, error, words in [
        ({"ids": good["ids"].astype(np.int64)}, TypeError, "ids is int64"),
        ({"ids": np.asfortranarray(good["ids"])}, TypeError, "not C-contiguous"),
        ({"ids": good["ids"].tolist()}, TypeError, "not a numpy array"),
        ({"logprobs": good["logprobs"][:, :50].copy()}, ValueError, "'logprobs' has 50"),
        ({"seg_weight": good["seg_weight"][:-1]}, ValueError, "'seg_weight' has"),
        ({"cu_seqlens": good["cu_seqlens"][:, 1:].copy()}, ValueError, "'cu_seqlens' has"),
        ({"labels": good["ids"]}, KeyError, "unknown buffer 'labels'"),
    ]:
        with pytest.raises(error, match=words):
            b.write(plan, 0, {**good, **change})
    with pytest.raises(KeyError, match="no buffer 'ids'"):
        b.write(plan, 0, {k: v for k, v in good.items() if k != "ids"})
    frozen = good["ids"].copy()
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match="'ids' is read-only"):
        b.write(plan, 0, {**good, "ids": frozen})
    with pytest.raises(ValueError, match="rank=2"):
        b.write(plan, 2, good)
    with pytest.raises(ValueError, match="micro-batches, the plan has"):
        b.write(plan, 0, {k: v[:-1] for k, v in good.items()})
    tensors = {k: torch.zeros(v.shape, dtype=torch.from_numpy(v).dtype) for k, v in good.items()}
    b.write(plan, 1, good)
    b.write(plan, 1, tensors)
    assert_same({k: v.numpy() for k, v in tensors.items()}, good)


def test_larger_buffers_are_padded() -> None:
    """A pool made for a larger plan serves a smaller one: spare rows, tokens and segments are blank."""
    b = make(pad_id=3)
    replay(workload(b, 2), b)
    plan = b.plan(0)
    exact, n, s = plan.buffers(), plan.n_mb, plan.max_segments
    b.write(plan, 0, exact)
    large = {}
    for name, a in exact.items():
        spare = {96: 128, s: s + 3, s + 2: s + 5}
        large[name] = np.full((n + 2, *(spare[x] for x in a.shape[1:])), 77, a.dtype)
    b.write(plan, 0, large)
    for name in ("ids", "loss_mask", "logprobs", "seg_weight", "seg_traj"):
        width = exact[name].shape[1]
        assert (large[name][:n, :width] == exact[name]).all(), name
        blank = {"ids": 3, "seg_traj": -1}.get(name, 0)
        assert (large[name][:n, width:] == blank).all() and (large[name][n:] == blank).all(), name
    assert large["n_seg"].tolist() == [*exact["n_seg"], 0, 0]
    assert (np.diff(large["cu_seqlens"]) >= 0).all() and (large["cu_seqlens"][:, -1] == 128).all()
    rows, width = plan.padded_shapes[0, 0]
    wide = {"ids": np.full((rows + 1, width + 5), 77, np.int32), "seg_traj": np.zeros(rows + 1, np.int64)}
    b.write_padded(plan, 0, 0, wide)
    assert (wide["ids"][-1] == 3).all() and (wide["ids"][:, width:] == 3).all() and wide["seg_traj"][-1] == -1
    with pytest.raises(ValueError, match="rows of"):
        b.write_padded(plan, 0, 0, {"ids": np.zeros((rows, width - 1), np.int32)})


def test_a_dropped_query_cannot_be_written() -> None:
    """A plan outlives the batcher's content only to say so, also when the memory is in use again."""
    b = make()
    fill(b, {(0, 0): 1.0, (1, 0): 0.0}, "q")
    plan = b.plan(0)
    b.drop("q")
    calls = (
        lambda: b.write(plan, 0, plan.buffers()),
        lambda: b.write_padded(plan, 0, 0, plan.padded_buffers(0, 0)),
    )
    for name in ("p", "r"):
        for call in calls:
            with pytest.raises(TrajectoryError) as caught:
                call()
            assert (caught.value.kind, caught.value.query) == ("dropped", "q")
        fill(b, {(0, 0): 1.0, (1, 0): 0.0}, name)


def test_state_is_checked() -> None:
    """Other options, a used batcher and damaged columns are refused with the key."""
    b = make()
    replay(workload(b, 1), b)
    state = b.state_dict()
    with pytest.raises(ValueError, match="needs an empty batcher"):
        b.load_state_dict(state)
    with pytest.raises(ValueError, match="seed=0, this batcher has 9"):
        make(seed=9).load_state_dict(state)
    with pytest.raises(ValueError, match="is out of order"):
        swapped = state["offsets"].copy()
        swapped[[1, 2]] = swapped[[2, 1]]
        make().load_state_dict({**state, "offsets": swapped})
    with pytest.raises(ValueError, match="differ in length"):
        make().load_state_dict({**state, "tokens": state["tokens"][:-1]})
    with pytest.raises(ValueError, match="no column 'advantages'"):
        make().load_state_dict({k: v for k, v in state.items() if k != "advantages"})
    other = make(threads=7, arena_bytes=1 << 20)
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert_same(everything(other, 4), everything(b, 4))


def test_the_planned_queries_are_the_first_in_natural_order() -> None:
    """n_groups takes 2/9 before 2/10, and a named list wins."""
    b = make(k=1)
    for name in ("2/10", "10/1", "2/9", "1/7"):
        b.seal(name, 0, 0)
    assert b.plan(0, 3).queries == ["1/7", "2/9", "2/10"]
    assert b.plan(0, queries=["10/1", "2/9"]).queries == ["2/9", "10/1"]
    with pytest.raises(ValueError, match="2/9 is asked for twice"):
        b.plan(0, queries=["2/9", "2/9"])


def test_bins_reach_their_lower_bound() -> None:
    """The micro-batch count is ceil(tokens / capacity), rounded up to dp, on at least 99 % of a seeded
    corpus."""
    r = np.random.default_rng(0)
    reached = 0
    for _ in range(500):
        n = int(r.integers(40, 600))
        lengths = np.clip(r.lognormal(np.log(1500), 1, n), 1, 32768).astype(np.int32)
        dp = int(r.choice([1, 2, 4, 8]))
        bound = -(-int(lengths.sum()) // 32768)
        reached += pack(lengths, 32768, dp, 1.0, 2.0**-15)["n_mb"] * dp == -(-bound // dp) * dp
    assert reached >= 495


def test_the_packer_balances_the_workload_of_the_bench() -> None:
    """Efficiency, lockstep and token balance at 1k and 10k: figures of the plan, not of the clock."""
    for n, lockstep, efficiency in ((1000, 1.055, 0.96), (10_000, 1.004, 0.998)):
        lengths = np.clip(np.random.default_rng(0).lognormal(np.log(1500), 1, n), 1, 32768).astype(np.int32)
        p = pack(lengths, 32768, 8, 1.0, 2.0**-15)
        tokens = [
            lengths[p["items"][p["offsets"][r * p["n_mb"]] : p["offsets"][(r + 1) * p["n_mb"]]]].sum()
            for r in range(8)
        ]
        assert p["lockstep"] <= lockstep and p["efficiency"] >= efficiency
        assert max(tokens) / np.mean(tokens) <= 1.001
