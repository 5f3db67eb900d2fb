"""Micro-batches whose rows share prefixes: what every layout must keep, on random trees of rows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mgrpo.batcher import Batcher, Plan
from mgrpo.batcher.prefix_tree import MIN_SAVED
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
            assert all(entering[i][:prefix] == first and len(entering[i]) > prefix for i in items)
            assert seen.setdefault(int(plan.prefix_id[rank, step]), first) == first
        else:
            assert plan.prefix_id[rank, step] == -1
        if not items:
            continue
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
