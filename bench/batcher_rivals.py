"""Batch assembly in Python, written from the published algorithms of the packers people use today.

Input of all: trajectories as lists of torch tensors (ids, loss_mask, logprobs) and one advantage each.
Output of the packed ones: for every rank a list of micro-batches with concatenated columns and cu_seqlens;
positions have the dtype of the ids. The Rust packer seqpacker is not among them: it comes as source only
and builds only where a Rust registry can be reached.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Bins = list[list[int]]


@dataclass
class Lists:
    """What a Python trainer holds: one tensor a trajectory and column."""

    ids: list[torch.Tensor]
    loss_mask: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    advantages: list[float]
    lengths: list[int] = field(default_factory=list)


def first_fit_count(lengths: Sequence[int], capacity: int) -> int:
    """Number of bins that first fit needs, in order of arrival."""
    rooms: list[int] = []
    for length in lengths:
        for b, room in enumerate(rooms):
            if room >= length:
                rooms[b] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def karmarkar_karp(lengths: Sequence[int], k: int) -> Bins:
    """Largest differencing method for k parts: the two states of the largest spread merge, heavy part with
    light."""
    heap = []
    for i, length in enumerate(lengths):
        parts = [(0, ())] * (k - 1) + [(length, (i,))]  # ascending sums; items as nested pairs
        heap.append((-length, i, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, order, a = heapq.heappop(heap)
        _, _, b = heapq.heappop(heap)
        parts = sorted(
            ((x[0] + y[0], (x[1], y[1])) for x, y in zip(a, reversed(b), strict=True)), key=lambda p: p[0]
        )
        heapq.heappush(heap, (parts[0][0] - parts[-1][0], order, parts))
    return [_flatten(items) for _, items in heap[0][2]]


def _flatten(items: tuple) -> list[int]:
    out, stack = [], [items]
    while stack:
        top = stack.pop()
        if isinstance(top, int):
            out.append(top)
        else:
            stack.extend(top)
    return sorted(out)


def plan_first_fit_kk(lengths: Sequence[int], capacity: int, dp: int) -> list[Bins]:
    """Round robin over ranks; a rank's micro-batch count is first fit's, their content Karmarkar-Karp's."""
    mine = [list(range(rank, len(lengths), dp)) for rank in range(dp)]
    count = max(first_fit_count([lengths[i] for i in items], capacity) for items in mine)
    return [
        [[items[i] for i in part] for part in karmarkar_karp([lengths[i] for i in items], count)]
        for items in mine
    ]


class SegmentTree:
    """Largest room below each node; finds the leftmost bin of at least some room in O(log n)."""

    def __init__(self, n: int) -> None:
        self.size = 1 << max(1, (n - 1).bit_length())
        self.best = [0] * (2 * self.size)

    def set(self, i: int, value: int) -> None:
        i += self.size
        self.best[i] = value
        while i > 1:
            i //= 2
            self.best[i] = max(self.best[2 * i], self.best[2 * i + 1])

    def leftmost(self, at_least: int) -> int:
        i = 1
        if self.best[1] < at_least:
            return -1
        while i < self.size:
            i *= 2
            if self.best[i] < at_least:
                i += 1
        return i - self.size


def plan_best_fit_decreasing(lengths: Sequence[int], capacity: int, dp: int) -> list[Bins]:
    """Best-fit decreasing with a segment tree over rooms (index = room), bins dealt to ranks in turn."""
    tree = SegmentTree(capacity + 1)
    by_room: dict[int, list[int]] = {}
    bins: Bins = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = _smallest_room(tree, lengths[i])
        if room < 0:
            b, room = len(bins), capacity
            bins.append([])
        else:
            b = by_room[room].pop()
            if not by_room[room]:
                tree.set(room, 0)
        bins[b].append(i)
        left = room - lengths[i]
        if left:
            by_room.setdefault(left, []).append(b)
            tree.set(left, left)
    bins += [[] for _ in range(-len(bins) % dp)]
    return [bins[rank::dp] for rank in range(dp)]


def _smallest_room(tree: SegmentTree, length: int) -> int:
    # Leaf r holds r when some bin has room r: the leftmost leaf of at least `length` is the best fit.
    return tree.leftmost(length)


def assemble_cat(
    data: Lists, plan: list[Bins], *, minimal: bool = False
) -> list[list[dict[str, torch.Tensor]]]:
    """torch.cat of every column of every micro-batch; per-token advantages and positions unless minimal."""
    ranks = []
    for bins in plan:
        batches = []
        for items in bins:
            if not items:
                continue
            lengths = [data.lengths[i] for i in items]
            batch = {
                "ids": torch.cat([data.ids[i] for i in items]),
                "loss_mask": torch.cat([data.loss_mask[i] for i in items]),
                "logprobs": torch.cat([data.logprobs[i] for i in items]),
                "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            }
            if not minimal:
                batch["advantages"] = torch.cat(
                    [torch.full((n,), data.advantages[i]) for i, n in zip(items, lengths, strict=True)]
                )
                batch["position_ids"] = torch.cat([torch.arange(n, dtype=data.ids[0].dtype) for n in lengths])
            batches.append(batch)
        ranks.append(batches)
    return ranks


def assemble_padded(data: Lists, rows: int, dp: int) -> list[list[dict[str, torch.Tensor]]]:
    """Chunks of `rows` trajectories in order of arrival, right-padded to the longest of the chunk."""
    pad: Callable[..., torch.Tensor] = torch.nn.utils.rnn.pad_sequence
    chunks = [list(range(i, min(i + rows, len(data.lengths)))) for i in range(0, len(data.lengths), rows)]
    batches = []
    for items in chunks:
        batches.append(
            {
                name: pad([column[i] for i in items], batch_first=True)
                for name, column in (
                    ("ids", data.ids),
                    ("loss_mask", data.loss_mask),
                    ("logprobs", data.logprobs),
                )
            }
        )
    return [batches[rank::dp] for rank in range(dp)]
