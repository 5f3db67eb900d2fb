"""Batches of rows of unequal width."""

from __future__ import annotations

import numpy as np

from mgrpo.model.groups import width_groups


def test_groups_partition_the_rows_at_least_cost():
    """Every row is in one group; no split into contiguous widths is cheaper (all 2^k tried)."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        overhead = int(rng.integers(1, 200))
        width = rng.choice([1, 2, 4, 9, 30], size=rng.integers(1, 40))
        groups = width_groups(width, overhead)
        assert sorted(np.concatenate(groups).tolist()) == list(range(len(width)))
        cost = sum(overhead + len(g) * width[g].max() for g in groups)
        sizes = np.unique(width)
        for bits in range(1 << (len(sizes) - 1)):
            other, start = 0, 0
            for j in range(len(sizes)):
                if j == len(sizes) - 1 or bits >> j & 1:
                    inside = (width >= sizes[start]) & (width <= sizes[j])
                    other += overhead + int(inside.sum()) * int(sizes[j])
                    start = j + 1
            assert cost <= other
