"""Buffers, state, order of queries and balance of the batcher."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from mgrpo._C import pack
from mgrpo.errors import TrajectoryError
from tests.batcher_kit import assert_same, everything, fill, make, replay, workload


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
    """The micro-batch count is ceil(tokens / capacity), rounded up to dp, on at least 99 % of a seeded corpus."""
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
