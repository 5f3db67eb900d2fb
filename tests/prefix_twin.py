"""The prefix tree of csrc/prefix_tree.cpp, node by node in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mgrpo.batcher.prefix_tree import PrefixTree


@dataclass(eq=False)
class _Node:
    rows: list[int]  # that pass through it or end in it
    begin: int
    end: int
    children: list[_Node] = field(default_factory=list)


def twin_tree(rows: Sequence[Sequence[int]], min_saved: int) -> PrefixTree:
    """Of rows of at least one token each."""
    top = _Node(list(range(len(rows))), 0, 0)
    _branch(top, rows)
    _flatten(top, min_saved, is_top=True)
    nodes: list[tuple[_Node, int]] = []
    stops: list[int] = []

    def visit(node: _Node, parent: int) -> None:
        number = len(nodes)
        nodes.append((node, parent))
        stops.append(0)
        for child in node.children:
            visit(child, number)
        stops[number] = len(nodes)

    for root in top.children:
        visit(root, -1)
    leaf = np.zeros(len(rows), np.int32)
    for number, (node, _) in enumerate(nodes):  # the deepest node of a row comes last
        for row in node.rows:
            leaf[row] = number
    column = lambda values: np.array(list(values), np.int32)  # noqa: E731
    return PrefixTree(
        row=column(next(r for r in n.rows if len(rows[r]) >= n.end) for n, _ in nodes),
        begin=column(n.begin for n, _ in nodes),
        end=column(n.end for n, _ in nodes),
        parent=column(p for _, p in nodes),
        stop=column(stops),
        leaf=leaf,
        lengths=column(map(len, rows)),
    )


def _branch(node: _Node, rows: Sequence[Sequence[int]]) -> None:
    """The children of a node whose end is known: one for each token that rows go on with."""
    groups: dict[int, list[int]] = {}
    for row in node.rows:
        if len(rows[row]) > node.end:
            groups.setdefault(rows[row][node.end], []).append(row)
    for members in groups.values():
        end = node.end + 1
        while len({rows[m][end] for m in members if len(rows[m]) > end}) == 1:
            end += 1
        child = _Node(members, node.end, end)
        node.children.append(child)
        _branch(child, rows)


def _flatten(node: _Node, min_saved: int, is_top: bool = False) -> None:
    """From the top: what a node saves too little of its children have themselves; rows that end in it go to the first
    of these."""
    kept: list[_Node] = []
    for child in node.children:
        kept += _pushed(child, min_saved)
    node.children = kept
    for child in node.children:
        _flatten(child, min_saved)


def _pushed(node: _Node, min_saved: int) -> list[_Node]:
    if len(node.children) < 2 or (node.end - node.begin) * (len(node.children) - 1) >= min_saved:
        return [node]
    below = {row for child in node.children for row in child.rows}
    ended = [row for row in node.rows if row not in below]
    first = node.children[0]
    first.rows = sorted(first.rows + ended)
    out: list[_Node] = []
    for child in node.children:
        child.begin = node.begin
        out += _pushed(child, min_saved)
    return out
