"""Micro-batches whose rows share prefixes: what every layout must keep, on random trees of rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mgrpo.batcher import Batcher, Plan
from mgrpo.batcher.prefix_tree import MIN_SAVED
from tests import batcher_kit as kit
from tests.prefix_twin import twin_tree
from tests.shared_twin import shared_layout

Rows = list[list[int]]
OPTIONS: dict[str, Any] = {"d_max": {"sub": 4}, "mode": "none", "arena_bytes": 1 << 24}


def forest(r: np.random.Generator, n: int, capacity: int) -> Rows:
    """Rows that fork from earlier ones, for the most part behind a long prefix; some are the same or a prefix of
    another."""
    rows: Rows = []
    for _ in range(n):
        base = rows[r.integers(len(rows))] if rows and r.random() < 0.85 else []
        kept = base[: r.integers(len(base) // 2, len(base) + 1)] if base else []
        own = r.integers(0, 900, r.integers(0, max(2, capacity // 3))).tolist()
        rows.append(([*kept, *own] or [7])[:capacity])
    return rows


def batcher_of(rows: Rows, order: np.ndarray | None = None, **options: Any) -> Batcher:
    """Each row is a rollout of its own, four a query."""
    b = Batcher(4, **{**OPTIONS, **options})
    calls = []
    queries = -(-len(rows) // 4)
    for i, row in enumerate(rows):
        mask = np.ones(len(row), np.uint8)
        logprobs = np.zeros(len(row), np.float32)
        args = (f"0/{i // 4}", i % 4, 0, i, np.array(row, np.int32), mask, logprobs, 0.5, 0)
        calls.append(("add", args))
    for q, k in itertools.product(range(queries), range(4)):
        calls.append(("seal", (f"0/{q}", k, int(4 * q + k < len(rows)))))
    for i in order if order is not None else range(len(calls)):
        name, args = calls[i]
        getattr(b, name)(*args)
    return b


def micro_batches(plan: Plan) -> list[list[list[int]]]:
    """Items of [rank][step]."""
    bounds = plan.core.padded_offsets
    bins = [plan.core.padded_items[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return [bins[rank * plan.n_padded : (rank + 1) * plan.n_padded] for rank in range(plan.core.dp)]


def check(rows: Rows, plan: Plan, max_rows: int | None = None) -> int:
    """The invariants of a layout of one item a row; returns what is computed."""
    entering = [row[: max(len(row) - 1, 1)] for row in rows]
    bins = micro_batches(plan)
    assert sorted(itertools.chain(*itertools.chain(*bins))) == list(range(len(rows)))
    computed, seen = 0, {}
    for rank, step in itertools.product(range(plan.core.dp), range(plan.n_padded)):
        items, prefix = bins[rank][step], int(plan.prefixes[rank, step])
        assert max_rows is None or len(items) <= max_rows
        assert plan.padded_shapes[rank, step].tolist() == [
            len(items),
            max((len(rows[i]) for i in items), default=0),
        ]
        if prefix:
            first = entering[items[0]][:prefix]
            assert len(first) == prefix
            assert all(entering[i][:prefix] == first[: len(entering[i])] for i in items)
            assert seen.setdefault(int(plan.prefix_id[rank, step]), first) == first
        else:
            assert plan.prefix_id[rank, step] == -1
        if not items:
            continue
        ended = [i for i in items if prefix and len(entering[i]) <= prefix]
        assert all(plan.row_shared[i] == len(entering[i]) for i in ended)
        items = items[: len(items) - len(ended)]
        tree = twin_tree([entering[i][prefix:] for i in items], MIN_SAVED)
        assert prefix + tree.tokens <= plan.capacity
        computed += tree.tokens
        known: set[int] = set()
        for place, item in enumerate(items):
            # An earlier row has all of a node, or this one computes all of it.
            begin, node = len(entering[item]), int(tree.leaf[place])
            while node >= 0 and node not in known:
                known.add(node)
                assert tree.row[node] == place
                begin, node = prefix + int(tree.begin[node]), int(tree.parent[node])
            assert plan.row_shared[item] == begin
    held = sum(map(len, seen.values()))
    assert plan.row_shared.sum() == sum(map(len, entering)) - computed
    assert plan.shared_tokens == sum(map(len, entering)) - computed - held
    ids = plan.prefix_id[plan.prefix_id >= 0].tolist()
    assert ids == sorted(ids) and set(ids) == set(range(len(seen)))
    assert all(ids.count(i) > 1 for i in ids)
    return computed + held


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dp", [1, 3])
def test_random_layouts_keep_their_promises(seed: int, dp: int) -> None:
    """Every item once, distinct tokens within capacity, shared tokens and rows as the micro-batches have them; and the
    same micro-batches as the twin."""
    r = np.random.default_rng([seed, dp])
    for _ in range(12):
        capacity, max_rows = int(r.choice([90, 200, 600])), r.choice([None, 1, 3, 9])
        rows = forest(r, int(r.integers(1, 40)), capacity)
        options = {"capacity": capacity, "dp": dp, "max_segments": max_rows and int(max_rows)}
        b = batcher_of(rows, **options)
        for hold in (False, True)[: 1 + (dp == 1)]:
            plan = b.plan(0, share_prefixes=True, hold_prefixes=hold)
            check(rows, plan, options["max_segments"])
            twin = shared_layout(rows, b.options, hold)
            if twin is None:
                assert plan.shared_tokens == 0
                continue
            assert micro_batches(plan) == twin.bins
            assert plan.prefixes.tolist() == twin.prefixes
            assert plan.prefix_id.tolist() == twin.prefix_id


def tokens(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, n).tolist()


def test_a_tree_that_fits_stays_together() -> None:
    """Two prompts of 100 tokens with four answers of 40: each prompt is computed once, in one micro-batch."""
    prompts = [tokens(0, 100), tokens(1, 100)]
    rows = [prompts[i % 2] + tokens(10 + i, 41) for i in range(8)]
    plan = batcher_of(rows, capacity=260, dp=1).plan(0, share_prefixes=True)
    assert check(rows, plan) == 2 * (100 + 4 * 40)
    assert sorted(map(sorted, micro_batches(plan)[0])) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plan.shared_tokens == 600 and sorted(plan.row_shared.tolist()) == [0] * 2 + [100] * 6


def test_a_tree_that_does_not_fit_is_cut_at_branches() -> None:
    """One prompt of 100 tokens, two histories of 60 behind it with three answers of 40 each: 100 + 2 x (60 + 3 x 40).
    A capacity of 280 takes one history in a micro-batch, which repeats the prompt, or it is held for both."""
    prompt, histories = tokens(0, 100), [tokens(1, 60), tokens(2, 60)]
    rows = [prompt + histories[i % 2] + tokens(10 + i, 41) for i in range(6)]
    b = batcher_of(rows, capacity=280, dp=1)
    plan = b.plan(0, share_prefixes=True)
    assert sorted(map(sorted, micro_batches(plan)[0])) == [[0, 2, 4], [1, 3, 5]]
    assert plan.prefixes.tolist() == [[0, 0]] and check(rows, plan) == 560
    held = b.plan(0, share_prefixes=True, hold_prefixes=True)
    assert micro_batches(held) == micro_batches(plan)
    assert held.prefixes.tolist() == [[100, 100]] and held.prefix_id.tolist() == [[0, 0]]
    assert check(rows, held) == 460 and held.shared_tokens == plan.shared_tokens + 100


def test_pieces_that_meet_stay_within_the_capacity() -> None:
    """40 prompts of 32 tokens, two answers each, of which all have the first token. Where more than 32 of them meet,
    that token becomes a node and what is left of a prompt saves 31 tokens, so that it is none: twice the tokens."""
    rows = [[9, *[1000 + i] * 31, answer, 0] for i in range(40) for answer in (1, 2)]
    b = batcher_of(rows, capacity=2080, dp=1)
    plan = b.plan(0, share_prefixes=True)
    assert check(rows, plan) == 40 * (32 + 2)
    twin = shared_layout(rows, b.options, False)
    assert twin is not None and micro_batches(plan) == twin.bins


def test_rows_within_a_held_prefix_compute_nothing() -> None:
    """A row whose entering tokens are the prompt, or a part of it, is the last of its micro-batch."""
    prompt = tokens(0, 100)
    rows = [prompt[:61], [*prompt, 5], *(prompt + tokens(10 + i, 61) for i in range(4))]
    plan = batcher_of(rows, capacity=230, dp=1).plan(0, share_prefixes=True, hold_prefixes=True)
    assert plan.prefixes.tolist() == [[100, 100]] and check(rows, plan) == 100 + 4 * 60
    assert plan.row_shared.tolist() == [60, 100, 100, 100, 100, 100]
    assert all(items[0] > 1 for items in micro_batches(plan)[0])


def test_nothing_shared_is_the_usual_layout() -> None:
    """Rows of which no two have a prefix worth a node: all bits are the same as without share_prefixes."""
    rows = [[1, 2, *tokens(i, 5 + 7 * i)] for i in range(12)]
    b = batcher_of(rows, capacity=200, dp=2)
    kit.assert_same(kit.everything(b, 3), kit.everything(b, 3, share_prefixes=True))
    plan = b.plan(3, share_prefixes=True)
    assert plan.shared_tokens == 0 and not plan.row_shared.any() and (plan.prefix_id == -1).all()
    assert not plan.prefixes.any()


def test_layouts_do_not_depend_on_arrival_or_threads() -> None:
    """The same rows in another order of arrival, on another number of threads, a second time: the same bits."""
    r = np.random.default_rng(5)
    rows = forest(r, 48, 300)
    expected = kit.everything(batcher_of(rows, capacity=300, dp=2), 1, share_prefixes=True)
    for threads in (1, 4):
        b = batcher_of(rows, r.permutation(96), capacity=300, dp=2, threads=threads)
        for _ in range(2):
            kit.assert_same(expected, kit.everything(b, 1, share_prefixes=True))


def test_written_rows_are_those_of_the_layout() -> None:
    """Buffers of a shared micro-batch hold the rows in its order, though rows x width is above the capacity."""
    prompt = tokens(0, 80)
    rows = [prompt + tokens(10 + i, 5 + i) for i in range(8)]
    b = batcher_of(rows, capacity=160, dp=1)
    plan = b.plan(0, share_prefixes=True)
    (items,) = micro_batches(plan)[0]
    out = plan.padded_buffers(0, 0)
    assert out["ids"].size > plan.capacity
    b.write_padded(plan, 0, 0, out)
    assert out["seg_row"].tolist() == items
    assert [out["ids"][i, : out["lengths"][i]].tolist() for i in range(8)] == [rows[i] for i in items]


def test_copies_are_computed_once() -> None:
    """Mode `duplicate`: the second of two equal rows computes nothing; the row counts as its first copy does."""
    b = Batcher(1, **{**OPTIONS, "mode": "duplicate", "capacity": 200, "dp": 1})
    mask, logprobs = np.ones(101, np.uint8), np.zeros(101, np.float32)
    b.add("0/0", 0, 0, 7, np.array(tokens(0, 101), np.int32), mask, logprobs, 0.5, 0)
    b.seal("0/0", 0, 1)
    plan = b.plan(0, share_prefixes=True)
    assert plan.rows.multiplicity.tolist() == [4] and plan.n_padded == 1
    assert plan.shared_tokens == 300 and plan.row_shared.tolist() == [0]


def test_ranks_get_their_part_of_few_trees() -> None:
    """One tree of eight answers for four ranks is cut, so that none of them is idle and none has half of it."""
    prompt = tokens(0, 100)
    rows = [prompt + tokens(10 + i, 101) for i in range(8)]
    plan = batcher_of(rows, capacity=2000, dp=4).plan(0, share_prefixes=True)
    assert check(rows, plan) == 4 * 100 + 8 * 100
    assert [len(items) for rank in micro_batches(plan) for items in rank] == [2, 2, 2, 2]


def test_a_full_micro_batch_for_one_tree_is_open_to_a_smaller_one() -> None:
    """max_segments of 5: one that has no room for the shortest tree, of four rows, still takes a longer one of one."""
    trees = [(4, 50), (1, 55), (1, 54), (2, 41), (1, 43), (3, 42), (1, 58)]  # rows, tokens of the prompt
    rows = [[*tokens(t, n), answer, 0] for t, (k, n) in enumerate(trees) for answer in range(k)]
    b = batcher_of(rows, capacity=1000, dp=2, max_segments=5)
    plan, twin = b.plan(0, share_prefixes=True), shared_layout(rows, b.options, False)
    check(rows, plan, 5)
    assert twin is not None and micro_batches(plan) == twin.bins


def test_ranks_share_long_prompts() -> None:
    """Two trees whose prompt is most of the capacity, for four ranks: each computes a prompt once, in one micro-batch,
    instead of four rows that repeat it."""
    rows = [tokens(i % 2, 700) + tokens(10 + i, 21) for i in range(16)]
    plan = batcher_of(rows, capacity=1000, dp=4).plan(0, share_prefixes=True)
    assert check(rows, plan) == 4 * 700 + 16 * 20
    assert plan.n_padded == 1 and all(items for rank in micro_batches(plan) for items in rank)


def test_many_trees_are_balanced_over_ranks() -> None:
    """40 trees on four ranks: none computes 10 % more than the mean."""
    r = np.random.default_rng(8)
    rows: Rows = []
    for tree in range(40):
        prompt = tokens(100 + tree, int(r.integers(40, 120)))
        rows += [prompt + tokens(int(r.integers(1 << 30)), int(r.integers(10, 90))) for _ in range(4)]
    plan = batcher_of(rows, capacity=1200, dp=4).plan(0, share_prefixes=True)
    check(rows, plan)
    entering = np.array([len(row) - 1 for row in rows]) - plan.row_shared
    computed = [entering[list(itertools.chain(*rank))].sum() for rank in micro_batches(plan)]
    assert max(computed) <= 1.1 * np.mean(computed)


def test_bins_are_as_full_as_packed_ones_where_little_is_shared() -> None:
    """200 rows of which two share a prefix need no more micro-batches than the packer takes for their lengths."""
    r = np.random.default_rng(9)
    rows = [
        tokens(i, int(n)) for i, n in enumerate(np.minimum(r.lognormal(5, 0.6, 200), 800).astype(int) + 2)
    ]
    rows[1] = rows[0][:-1] + tokens(500, 40)
    b = batcher_of(rows, capacity=1000, dp=1, arena_bytes=1 << 24)
    plan = b.plan(0, share_prefixes=True)
    check(rows, plan)
    assert plan.shared_tokens > 0 and plan.n_padded <= plan.n_mb


def test_hold_prefixes_is_refused_where_it_means_nothing() -> None:
    """Ranks hold no prefix for each other, and without share_prefixes there is none."""
    rows = [tokens(0, 50), tokens(0, 50)]
    with pytest.raises(ValueError, match="share_prefixes=True and dp=1, not share_prefixes=True and dp=2"):
        batcher_of(rows, capacity=60, dp=2).plan(0, share_prefixes=True, hold_prefixes=True)
    with pytest.raises(ValueError, match="not share_prefixes=False"):
        batcher_of(rows, capacity=60, dp=1).plan(0, hold_prefixes=True)
