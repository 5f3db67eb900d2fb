"""What rows of tokens have in common: a prefix tree (trie) over them, built in C++ (csrc/prefix_tree.cpp).

    ids  0: a b c d e        nodes  0: a b c        of rows 0, 1, 2; tokens 0..3
         1: a b c f g               1:       d e    of row 0, its parent is 0
         2: a b c f                 2:       f g    of rows 1 and 2: a row may end within its last node

A policy computes each node once (mgrpo/model/shared_rows.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mgrpo import _C
from mgrpo.types import Int32

MIN_SAVED = 32
"""Tokens that a node must save to be one: its length times the rows below it that would have it otherwise, less one.
What several rows share for less than that, as the first tokens of a chat template, is computed for each: one more node
costs about as much as so many tokens."""


@dataclass(frozen=True)
class PrefixTree:
    """N nodes in preorder, of R rows. Children are in the order of their first rows, and so are roots."""

    row: Int32  # (N,) the first row that has the node
    begin: Int32  # (N,) of that row's tokens; also the depth of the node: what its ancestors hold
    end: Int32  # (N,)
    parent: Int32  # (N,) -1: a root
    stop: Int32  # (N,) the number behind the last node below it
    leaf: Int32  # (R,) the node in which each row ends
    lengths: Int32  # (R,)

    @cached_property
    def tokens(self) -> int:
        """Of all nodes: what is computed."""
        return int((self.end - self.begin).sum())

    @cached_property
    def saved(self) -> int:
        """Tokens of the rows that are not computed because another row has them."""
        return int(self.lengths.sum()) - self.tokens


def prefix_tree(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], min_saved: int = MIN_SAVED
) -> PrefixTree:
    """Of right-padded rows ids i64[R, S] with lengths i64[R], each 1..S. Raises ValueError naming the row whose length
    is outside. A pure function of its arguments."""
    return PrefixTree(**_C.prefix_tree(ids, lengths, min_saved))
