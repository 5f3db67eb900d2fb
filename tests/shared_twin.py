"""The layout of csrc/shared_layout.cpp in plain Python, on the twins of the tree and of the packer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mgrpo.batcher.prefix_tree import MIN_SAVED, PrefixTree
from tests.pack_twin import pack
from tests.prefix_twin import twin_tree

Items = list[int]


@dataclass
class TwinLayout:
    bins: list[list[Items]]  # [rank][step]
    prefixes: list[list[int]]
    prefix_id: list[list[int]]


@dataclass
class Unit:
    items: Items
    tokens: int
    cost: float
    piece: bool


def covering_order(tree: PrefixTree) -> Items:
    def key(r: int) -> tuple[int, int, int, int]:
        leaf = tree.leaf[r]
        return int(tree.stop[leaf]), -int(leaf), -int(tree.lengths[r]), r

    return sorted(range(len(tree.leaf)), key=key)


class Twin:
    def __init__(self, rows: list[list[int]], options: dict[str, Any], hold: bool) -> None:
        self.rows = [row[: max(len(row) - 1, 1)] for row in rows]
        self.o, self.hold = options, hold
        self.most = options["max_segments"] or len(rows)
        self.tree = twin_tree(self.rows, MIN_SAVED)

    def computed(self, items: Items, held: int) -> tuple[PrefixTree, Items]:
        """What is computed behind a held prefix, and the order of the rows."""
        inside = [i for i in items if len(self.rows[i]) > held]
        tree = twin_tree([self.rows[i][held:] for i in inside], MIN_SAVED)
        ended = sorted((i for i in items if i not in inside), key=lambda i: (-len(self.rows[i]), i))
        return tree, [inside[i] for i in covering_order(tree)] + ended

    def unit(self, items: Items, skip: int, piece: bool) -> list[Unit]:
        tree, order = self.computed(items, skip)
        if skip + tree.tokens > self.o["capacity"]:
            half = len(tree.leaf) // 2
            return [u for part in (order[:half], order[half:]) for u in self.unit(sorted(part), skip, True)]
        cost = 0.0
        for node in range(len(tree.row)):
            begin, end = float(skip + tree.begin[node]), float(skip + tree.end[node])
            cost += self.o["cost"][0] * (end - begin) + self.o["cost"][1] * (end * end - begin * begin)
        return [Unit(items, skip + tree.tokens, cost, piece)]

    def cut(self, node: int, own: int) -> list[tuple[int, Items]]:
        """(tokens from the node's begin, rows) of each piece."""
        t = self.tree
        inside = range(node, int(t.stop[node]))
        tokens = sum(int(t.end[n] - t.begin[n]) for n in inside)
        rows = sorted((r for r in range(len(self.rows)) if t.leaf[r] in inside), key=lambda r: (t.leaf[r], r))
        limit = self.o["capacity"]
        if tokens <= min(own, limit - t.begin[node]) and len(rows) <= self.most:
            return [(tokens, rows)]
        parts: list[tuple[int, Items]] = []
        for child in inside:
            if t.parent[child] == node:
                parts += self.cut(child, own)
        parts += [(0, [r]) for r in rows if t.leaf[r] == node]
        bins: list[tuple[int, Items]] = []
        for size, some in sorted(parts, key=lambda part: -part[0]):
            fitting = [
                b
                for b, (used, held) in enumerate(bins)
                if used + size <= min(own, limit - t.end[node]) and len(held) + len(some) <= self.most
            ]
            if fitting:
                b = max(fitting, key=lambda b: bins[b][0])
                bins[b] = (bins[b][0] + size, bins[b][1] + some)
            else:
                bins.append((size, some))
        return [(size + int(t.end[node] - t.begin[node]), some) for size, some in bins]

    def units(self, own: int) -> tuple[list[Unit], list[tuple[int, list[Unit]]]]:
        free: list[Unit] = []
        held: list[tuple[int, list[Unit]]] = []
        for root in range(len(self.tree.row)):
            if self.tree.parent[root] >= 0:
                continue
            pieces = [sorted(items) for _, items in self.cut(root, own)]
            if len(pieces) == 1:
                free += self.unit(pieces[0], 0, False)
                continue
            prefix = int(self.tree.end[root])
            further = [any(len(self.rows[i]) > prefix for i in items) for items in pieces]
            if not self.hold or sum(further) < 2:
                free += [u for items in pieces for u in self.unit(items, 0, True)]
                continue
            held.append((prefix, []))
            for items, goes_on in zip(pieces, further, strict=True):
                if goes_on:
                    held[-1][1].extend(self.unit(items, prefix, True))
                else:
                    free += self.unit(items, 0, False)
        return free, held

    def ordered(self, items: Items, held: int) -> Items:
        return self.computed(sorted(items), held)[1]

    def packed(self, units: list[Unit], slack: int) -> tuple[list[Items], int]:
        """Each micro-batch of each rank; micro-batches a rank."""
        capacity = self.o["capacity"]
        lengths = [min(capacity, u.tokens + slack * u.piece) for u in units]
        packing = pack(
            lengths, capacity, self.o["dp"], self.o["cost"], self.o["max_segments"],
            [u.cost for u in units], [len(u.items) for u in units],
        )  # fmt: skip
        return [[i for u in some for i in units[u].items] for some in packing.bins], packing.n_mb

    def layout(self) -> TwinLayout | None:
        capacity, dp = self.o["capacity"], self.o["dp"]
        if self.tree.saved == 0:
            return None
        own = capacity
        free, held = self.units(own)
        while dp > 1 and len(free) < min(dp, len(self.rows)) and own > 1:
            own //= 2
            free, held = self.units(own)
        slack = MIN_SAVED
        bins, n = self.packed(free, slack)
        while any(self.computed(sorted(items), 0)[0].tokens > capacity for items in bins if items):
            slack *= 2
            bins, n = self.packed(free, slack)
        out = [[self.ordered(items, 0) for items in bins[rank * n : (rank + 1) * n]] for rank in range(dp)]
        prefixes, numbers = [[0] * n for _ in range(dp)], [[-1] * n for _ in range(dp)]
        for number, (prefix, pieces) in enumerate(held):
            out[0] += [self.ordered(u.items, prefix) for u in pieces]
            prefixes[0] += [prefix] * len(pieces)
            numbers[0] += [number] * len(pieces)
        return TwinLayout(out, prefixes, numbers)


def shared_layout(rows: list[list[int]], options: dict[str, Any], hold: bool) -> TwinLayout | None:
    """Of one item a row; None where nothing is shared."""
    return Twin(rows, options, hold).layout()
