"""Rows with shared prefixes: the shapes that teams make, their micro-batches, and the arithmetic of a tree.

    rollouts    8 rollouts of one question: 1.5k tokens of prompt, 1.5k of answer
    answers     the same prompt, 4k of answer
    system      64 calls of a role: 3k of system prompt and tools, 4k of each
    fork        a conversation of 2k forks in two, 1k each, and each of these in four, 1k each
    long        8 rollouts: 2k of prompt, 16k of answer
    nothing     8 rows of 3k that share no prefix

The last level of a shape is sampled, and all else is masked. `scaled` divides its lengths; rows of a shape are equally
long, so padding is no part of a comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mgrpo.batcher.prefix_tree import PrefixTree, prefix_tree
from mgrpo.profiling.flops import Cost, ModelFlops
from mgrpo.trainers.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree whose nodes have the same number of tokens and of children on each level."""

    levels: tuple[tuple[int, int], ...]
    """(tokens, children of each node of the level before); the first level's are trees of their own."""

    def scaled(self, scale: float) -> Shape:
        """With lengths times `scale`, at least 2 tokens each."""
        return Shape(tuple((max(2, round(tokens * scale)), children) for tokens, children in self.levels))

    @property
    def length(self) -> int:
        """Of each row."""
        return sum(tokens for tokens, _ in self.levels)


SHAPES: dict[str, Shape] = {
    "rollouts": Shape(((1536, 1), (1536, 8))),
    "answers": Shape(((1536, 1), (4096, 8))),
    "system": Shape(((3072, 1), (4096, 64))),
    "fork": Shape(((2048, 1), (1024, 2), (1024, 4))),
    "long": Shape(((2048, 1), (16384, 8))),
    "nothing": Shape(((3072, 8),)),
}


def make_rows(shape: Shape, vocabulary: int, seed: int = 1) -> MicroBatch:
    """All rows of the shape, in preorder of its tree, sampled with log-prob 0 (step_workload.sample writes those of a
    model). Raises ValueError where the vocabulary has fewer tokens than a node has children."""
    most = max(children for _, children in shape.levels)
    if vocabulary < most:
        raise ValueError(f"a vocabulary of {vocabulary} tokens has no {most} first tokens")
    g = torch.Generator().manual_seed(seed)
    heads: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)]
    for tokens, children in shape.levels:
        grown = []
        for head in heads:
            first = torch.randperm(vocabulary, generator=g)[:children]  # children begin with other tokens
            for token in first:
                rest = torch.randint(vocabulary, (tokens - 1,), generator=g)
                grown.append(torch.cat([head, token[None], rest]))
        heads = grown
    ids = torch.stack(heads)
    sampled = shape.length - shape.levels[-1][0] if len(shape.levels) > 1 else shape.length // 2
    mask = (torch.arange(shape.length) >= sampled).expand(ids.shape).clone()
    advantages = torch.randn(len(ids), generator=g)
    lengths = torch.full((len(ids),), shape.length)
    return MicroBatch(ids, mask, torch.zeros(ids.shape), lengths, advantages, torch.ones(len(ids)))


def tree_of(rows: MicroBatch) -> PrefixTree:
    """Of the tokens that enter the model: all but the last of each row."""
    return prefix_tree(rows.ids[:, :-1].contiguous().numpy(), (rows.lengths - 1).clamp(min=1).numpy())


def pieces(rows: MicroBatch, capacity: int) -> list[MicroBatch]:
    """Micro-batches of at most `capacity` distinct entering tokens, rows in their order; each repeats the prefix of its
    rows. Raises ValueError where a row alone has more."""
    if (longest := int(rows.lengths.max()) - 1) > capacity:
        raise ValueError(f"capacity={capacity} is below the {longest} entering tokens of the longest row")
    numbers, found, begin = torch.arange(len(rows.lengths)), [], 0
    for end in range(1, len(numbers) + 1):
        if tree_of(rows.rows((numbers >= begin) & (numbers < end))).tokens > capacity:
            found.append(rows.rows((numbers >= begin) & (numbers < end - 1)))
            begin = end - 1
    return [*found, rows.rows(numbers >= begin)]


def held(parts: Sequence[MicroBatch], prefix: torch.Tensor) -> list[MicroBatch]:
    """The same pieces of one tree with the prefix that all of their rows have, which is computed once for all."""
    return [replace(part, prefix=prefix) for part in parts]


def common_prefix(rows: MicroBatch) -> torch.Tensor:
    """i64 (P,): what all rows begin with."""
    tree = tree_of(rows)
    if len(tree.parent) == 0 or int((tree.parent < 0).sum()) != 1:
        return rows.ids[0, :0]
    return rows.ids[int(tree.row[0]), : int(tree.end[0])]


def flops_of_rows(flops: ModelFlops, parts: Sequence[MicroBatch]) -> Cost:
    """Of a step in which each row is computed whole."""
    cost = Cost()
    for part in parts:
        entering = (part.lengths - 1).clamp(min=1).tolist()
        cost += flops.of(entering, int(part.loss_mask[:, 1:].sum()))
    return cost


def flops_of_trees(flops: ModelFlops, parts: Sequence[MicroBatch]) -> Cost:
    """Of a step in which each node of a micro-batch's tree is computed once."""
    cost = Cost()
    for part in parts:
        tree = tree_of(part)
        nodes = zip(tree.begin.tolist(), tree.end.tolist(), strict=True)
        cost += flops.of_nodes(nodes, int(part.loss_mask[:, 1:].sum()))
    return cost
