"""The prefix tree built in C++ (csrc/prefix_tree.cpp) against its definition node by node (tests/prefix_twin.py)."""

from __future__ import annotations

import numpy as np
import pytest

from mgrpo.batcher.prefix_tree import MIN_SAVED, PrefixTree, prefix_tree
from tests.prefix_twin import twin_tree

COLUMNS = ("row", "begin", "end", "parent", "stop", "leaf", "lengths")
Rows = list[list[int]]


def padded(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The padding repeats a token that rows have, so that a read behind a row's end would find something."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.ones((len(rows), int(lengths.max(initial=1))), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths


def same_as_twin(rows: Rows, min_saved: int) -> PrefixTree:
    tree, twin = prefix_tree(*padded(rows), min_saved), twin_tree(rows, min_saved)
    for name in COLUMNS:
        found, expected = getattr(tree, name), getattr(twin, name)
        assert found.dtype == np.int32
        assert found.tolist() == expected.tolist(), (name, rows, min_saved)
    return tree


def forked(r: np.random.Generator, n: int, tokens: int, longest: int) -> Rows:
    """Each row is a prefix of an earlier one, often empty, with tokens of its own behind it, sometimes none."""
    rows: Rows = []
    for _ in range(n):
        base = rows[r.integers(len(rows))] if rows and r.random() < 0.8 else []
        own = r.integers(0, tokens, r.integers(0, longest)).tolist()
        rows.append((base[: r.integers(len(base) + 1)] + own) or [int(r.integers(tokens))])
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_random_trees_are_the_twins(seed: int) -> None:
    """Small alphabets, forks, empty continuations, identical rows: every column is the same as the definition's."""
    r = np.random.default_rng(seed)
    for _ in range(60):
        rows = forked(r, int(r.integers(1, 24)), int(r.choice([1, 2, 3, 50])), int(r.choice([2, 5, 90])))
        same_as_twin(rows, int(r.choice([0, 1, 3, 8, 32, 10_000])))


def test_blocks_end_anywhere() -> None:
    """Rows part at each position around the blocks in which they are compared."""
    long = np.random.default_rng(0).integers(0, 1000, 1200).tolist()
    for at in [*range(140), *range(500, 530), *range(1010, 1040)]:
        same_as_twin([[*long[: at + 1], -1], long, long[:at] or [5], [*long[:at], 2000, 3]], 1)


def test_every_node_is_its_rows_tokens() -> None:
    """The row of a node has all of it, though an earlier row may end within; paths spell the rows."""
    rows = forked(np.random.default_rng(3), 300, 4, 30)
    tree = same_as_twin(rows, MIN_SAVED)
    assert tree.tokens + tree.saved == sum(map(len, rows))
    for row, leaf in zip(rows, tree.leaf, strict=True):
        path, node = [], int(leaf)
        while node >= 0:
            source = rows[tree.row[node]]
            assert len(source) >= tree.end[node]
            path = source[tree.begin[node] : tree.end[node]] + path
            node = int(tree.parent[node])
        assert path[: len(row)] == row


def test_a_small_node_goes_into_its_children() -> None:
    """Two tokens of a template that three rows share save four: as many rows of their own from min_saved 5."""
    rows = [[1, 1, *([token] * 40)] for token in (7, 8, 9)]
    assert len(same_as_twin(rows, 4).row) == 4
    assert same_as_twin(rows, 5).parent.tolist() == [-1, -1, -1]


def test_thousands_of_children_and_of_levels() -> None:
    """A root with 3000 children, and a comb of 3000 levels, which no recursion would survive."""
    wide = [[5] * 40 + [token] * 3 for token in range(3000)]
    tree = prefix_tree(*padded(wide))
    assert tree.parent.tolist() == [-1] + [0] * 3000 and tree.saved == 40 * 2999
    comb = np.zeros((3000, 3001), np.int64)
    lengths = np.arange(2, 3002)
    comb[np.arange(3000), lengths - 1] = 1
    tree = prefix_tree(comb, lengths, 1)
    # The tokens of the longest row, and the last of each other.
    assert tree.tokens == 3001 + 2999
    assert (tree.end[tree.leaf] == lengths).all()


def test_bad_rows_are_refused() -> None:
    """A length outside its row, and arrays of another shape or dtype, are named."""
    ids = np.zeros((3, 4), np.int64)
    for bad in (0, 5, -1):
        with pytest.raises(ValueError, match=rf"row 1 has length {bad}, which is outside \[1, 4\]"):
            prefix_tree(ids, np.array([4, bad, 1]))
    with pytest.raises(ValueError, match="lengths have 2 values, expected one for each of the 3 rows"):
        prefix_tree(ids, np.array([1, 1]))
    with pytest.raises(TypeError):
        prefix_tree(ids.astype(np.int32), np.array([1, 1, 1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        prefix_tree(ids.T, np.array([1, 1, 1, 1]))
    assert prefix_tree(np.zeros((0, 4), np.int64), np.zeros(0, np.int64)).tokens == 0
