"""Rows that begin alike, computed once: one forward pass over the nodes of their prefix tree.

    rows (R, S) -> prefix_tree -> nodes in one row of T tokens -> backbone -> hidden states (T, H)
                                    positions by depth                          -> a row of them for each scored token

A token sees its node up to itself and all of the node's ancestors (ops/tree_attention.py), which is what it sees in its
row: hidden states and gradients are those of the rows. At a branch one hidden state scores the first token of each
continuation, so it is taken once for each.

Two passes, where a tree is cut into several micro-batches: `hold` computes the prefix that all of them have, and keeps
its keys and values; each micro-batch attends to them and adds to their gradient; the backward pass of the prefix comes
last (HeldPrefix.backward). It is the chain rule, cut at the keys and values: nothing is approximated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mgrpo.batcher.prefix_tree import MIN_SAVED, PrefixTree, prefix_tree
from mgrpo.ops.tree_attention import Kernel, Level, Segment, level, tree_attention

KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]
"""Of each attention module, (P, G, D) each."""


class IgnoredTreeError(RuntimeError):
    """A model's attention has not gone by the prefix tree that it was given."""


@dataclass(slots=True)
class TreeForward:
    """What the attention of a forward pass over a tree goes by; reaches it as the argument `prefix_tree`."""

    levels: tuple[Level, ...]
    held: KeysAndValues | None = None
    keep: KeysAndValues | None = None
    """Takes the keys and values of each attention module."""
    used: bool = False
    """Some attention has gone by it. A model whose attention was replaced takes it for any other argument: its hidden
    states would be wrong without a word."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel
    ) -> Tensor:
        """q (T, H, D), k and v (T, G, D) -> (T, H, D)."""
        self.used = True
        if self.keep is not None:  # gradient checkpointing comes here again
            self.keep.setdefault(module, (k, v))
        held = self.held[module] if self.held is not None else None
        if held is not None:
            held = (held[0].to(k.dtype), held[1].to(v.dtype))
        return tree_attention(q, k, v, self.levels, scale, kernel, held)

    def run(self, states: Callable[..., Tensor], input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (T, H) of input_ids (1, T) at positions (1, T). Raises IgnoredTreeError where the model's
        attention goes by something else."""
        found = states(input_ids=input_ids, position_ids=positions, prefix_tree=self)[0]
        if not self.used:
            raise IgnoredTreeError(
                "the model's attention has been replaced since the policy was made: it takes no prefix tree; set "
                "policy.share_prefixes=false, or leave the attention as it is"
            )
        return found


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The nodes of a prefix tree as one row of T tokens, and where each row's tokens are in it."""

    input_ids: Tensor  # i64 (1, T)
    positions: Tensor  # i64 (1, T), in their rows
    levels: tuple[Level, ...]
    place: Tensor
    """i64 (R, S), of each token of a row: its hidden state's index, those of a held prefix first."""
    sizes: tuple[int, ...]
    """Tokens of each node."""

    def forward(
        self, states: Callable[..., Tensor], device: torch.device, held: HeldPrefix | None = None
    ) -> Tensor:
        """Hidden states (T, H) of the nodes' tokens. states: backbone arguments -> (1, T, H)."""
        tree = TreeForward(
            tuple(at.to(device) for at in self.levels), None if held is None else held.keys_and_values
        )
        return tree.run(states, self.input_ids.to(device), self.positions.to(device))


def share(
    ids: Tensor, lengths: Tensor, held: int = 0, min_saved: int = MIN_SAVED, anyway: bool = False
) -> SharedRows | None:
    """Of right-padded rows ids i64 (R, S) with lengths (R,), each 1..S, in main memory. held: the first tokens of every
    row, which are computed elsewhere. None where nothing is shared, unless `anyway`: the rows are computed as they are.
    """
    width = ids.shape[1]
    if not width:  # rows of one token, of which none enters
        return None
    lengths_ = lengths.numpy()
    inside = np.flatnonzero(lengths_ > held)  # a row may be a part of the held prefix
    # Right for the held tokens; padding is never asked for.
    place = np.tile(np.arange(width), (len(lengths_), 1))
    if not len(inside):
        empty = torch.zeros(1, 0, dtype=torch.int64)
        return SharedRows(empty, empty, (), torch.from_numpy(place), ())
    mine = np.ascontiguousarray(ids.numpy()[inside, held:])
    tree = prefix_tree(mine, lengths_[inside] - held, min_saved)
    if not tree.saved and not held and not anyway:
        return None
    sizes = tree.end - tree.begin
    starts = np.concatenate(([0], sizes.cumsum()))
    for number, row in enumerate(inside):
        node = int(tree.leaf[number])
        while node >= 0:
            begin, end = int(tree.begin[node]), min(int(tree.end[node]), int(lengths_[row]) - held)
            first = held + int(starts[node])
            place[row, held + begin : held + end] = np.arange(first, first + end - begin)
            node = int(tree.parent[node])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    depth = np.repeat(tree.begin, sizes) + within  # in what follows the held prefix
    return SharedRows(
        torch.from_numpy(mine[np.repeat(tree.row, sizes), depth])[None],
        torch.from_numpy(depth + held)[None],
        _levels(tree, starts, held),
        torch.from_numpy(place),
        tuple(sizes.tolist()),
    )


def _levels(tree: PrefixTree, starts: npt.NDArray[np.int64], held: int) -> tuple[Level, ...]:
    """Own tokens; then, for each depth of the tree, what is below the inner nodes there; then the held prefix."""
    borders = starts.tolist()
    own = [(a, b, a, b) for a, b in itertools.pairwise(borders)]
    above: list[list[Segment]] = []
    depth: list[int] = []
    for node, (parent, stop) in enumerate(zip(tree.parent.tolist(), tree.stop.tolist(), strict=True)):
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
        if stop > node + 1:
            if depth[node] == len(above):
                above.append([])
            above[depth[node]].append((borders[node + 1], borders[stop], borders[node], borders[node + 1]))
    found = [level(own, causal=True), *(level(segments, causal=False) for segments in above)]
    if held:
        found.append(level([(0, borders[-1], 0, held)], causal=False, held=True))
    return tuple(found)


@dataclass(slots=True)
class HeldPrefix:
    """A prefix of P tokens whose keys and values serve several micro-batches. Its hidden states, keys and values are
    leaves: the micro-batches' gradients add up in them, in float32 at least, until backward()."""

    ids: Tensor  # i64 (P,)
    hidden: Tensor  # (P, H)
    keys_and_values: KeysAndValues
    _roots: list[Tensor] = field(default_factory=list)
    _leaves: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Tensor, states: Callable[..., Tensor], device: torch.device) -> HeldPrefix:
        """Computed now. states: backbone arguments -> hidden states (1, P, H)."""
        kept: KeysAndValues = {}
        tree = TreeForward((level([(0, len(ids), 0, len(ids))], causal=True).to(device),), keep=kept)
        hidden = tree.run(states, ids.to(device)[None], torch.arange(len(ids), device=device)[None])
        prefix = cls(ids, hidden, {})
        prefix.hidden = prefix._leaf(hidden)
        prefix.keys_and_values = {m: (prefix._leaf(k), prefix._leaf(v)) for m, (k, v) in kept.items()}
        return prefix

    def _leaf(self, root: Tensor) -> Tensor:
        if not root.requires_grad:
            return root.detach()
        exact = torch.promote_types(root.dtype, torch.float32)
        leaf = root.detach().to(exact).requires_grad_()
        self._roots.append(root)
        self._leaves.append(leaf)
        return leaf

    def backward(self) -> None:
        """Add the gradient of all micro-batches that used it to the weights', and forget it."""
        pairs = [
            (r, x.grad.to(r.dtype))
            for r, x in zip(self._roots, self._leaves, strict=True)
            if x.grad is not None
        ]
        self._roots, self._leaves, self.keys_and_values = [], [], {}
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])
