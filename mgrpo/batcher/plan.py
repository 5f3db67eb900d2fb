"""What the batcher planned: rows, slots, micro-batches and the shapes of the buffers that will hold them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mgrpo import _C
from mgrpo.types import Float32, Int32

Buffers = dict[str, npt.NDArray[Any]]

_PACKED_TOKENS = {"ids": np.int32, "loss_mask": np.uint8, "logprobs": np.float32}
_LINE = 64  # bytes of a cache line
_SEGMENTS = {"seg_advantage": np.float32, "seg_weight": np.float32, "seg_traj": np.int64, "seg_row": np.int32}


@dataclass(frozen=True, slots=True)
class Rows:
    """The segments of the distinct kept trajectories (R), by group, rollout, invocation, segment."""

    group: Int32  # (R,) index into Plan.groups
    rollout: Int32
    invocation: Int32
    segment: Int32  # its place in the trajectory; those without a token with loss_mask 1 have no row
    multiplicity: Int32  # copies of the draw
    length: Int32  # tokens
    active: Int32  # tokens with loss_mask 1
    policy_version: Int32
    weight: npt.NDArray[np.float64]  # w(k,i) / rows of the trajectory, all copies together
    advantage: Float32  # of the trajectory; of each token: the mean over the segment's with loss_mask 1
    has_gradient: npt.NDArray[np.bool_]  # some token with loss_mask 1 has an advantage other than 0
    traj_id: npt.NDArray[np.int64]  # of the trajectory, whose rows follow one another

    def first(self) -> npt.NDArray[np.int64]:
        """(U,) the first row of each trajectory, for numpy's reduceat."""
        return np.flatnonzero(np.diff(self.traj_id, prepend=-1))


class Plan:
    """A batch before assembly. Attributes are computed on first use; nothing here changes the batcher."""

    def __init__(self, core: _C.Plan, options: dict[str, Any]) -> None:
        self.core = core
        self._options = options

    @property
    def step(self) -> int:
        return self.core.step

    @property
    def queries(self) -> list[str]:
        """In canonical order."""
        return self.core.queries

    @property
    def n_mb(self) -> int:
        """Packed micro-batches a rank."""
        return self.core.n_mb

    @property
    def n_padded(self) -> int:
        """Right-padded micro-batches a rank."""
        return self.core.n_padded

    @property
    def shared_tokens(self) -> int:
        """Entering tokens (of a row of L tokens its first max(L - 1, 1)) over all ranks that no forward pass over the
        padded micro-batches computes; 0 without share_prefixes."""
        return self.core.shared_tokens

    @property
    def row_shared(self) -> Int32:
        """Of each row, its leading entering tokens that another row of its micro-batch, or the held prefix, has
        computed, i32[R]; of a row with copies, of the copy that shares least; 0 for a row in no micro-batch. Without
        copies their sum is shared_tokens plus what the held prefixes count, each once."""
        return self.core.row_shared

    @property
    def prefixes(self) -> Int32:
        """Of each right-padded micro-batch, the tokens that it begins with and that are computed once for it and its
        neighbours of the same prefix_id: the first of its first row, and as many as each other row has.
        i32[dp, n_padded], 0 where there are none."""
        return self.core.padded_prefix.reshape(self.core.dp, self.core.n_padded)

    @property
    def prefix_id(self) -> Int32:
        """Of each right-padded micro-batch, the number of its held prefix, -1 where it has none, i32[dp, n_padded]."""
        return self.core.padded_prefix_id.reshape(self.core.dp, self.core.n_padded)

    @property
    def capacity(self) -> int:
        return self.core.capacity

    @property
    def max_segments(self) -> int:
        """S of the packed buffers: the option, or the most sequences in any micro-batch of this plan."""
        return self.core.max_segments

    @property
    def tokens(self) -> int:
        """Tokens over all ranks, copies of mode "duplicate" included, padding not."""
        return self.core.tokens

    @property
    def efficiency(self) -> float:
        """tokens / (micro-batches x capacity)."""
        return self.core.efficiency

    @property
    def rank_cost(self) -> npt.NDArray[np.float64]:
        """Cost of each rank, f64[dp]."""
        return self.core.rank_cost

    @property
    def lockstep(self) -> float:
        """Sum over micro-steps of the slowest rank's cost, over (total cost / dp): 1 = no rank ever waits."""
        return self.core.lockstep

    @cached_property
    def rows(self) -> Rows:
        return Rows(**self.core.rows)

    @property
    def unique(self) -> int:
        """U: distinct trajectories kept by the draw."""
        return len(self.rows.first())

    @property
    def multiplicity(self) -> Int32:
        """Copies of each distinct trajectory, i32[U]."""
        return self.rows.multiplicity[self.rows.first()]

    @cached_property
    def groups(self) -> list[tuple[str, str]]:
        """(query, role) of every group, G = queries x roles; groups without any invocation included."""
        roles, queries = self._options["roles"], self.core.queries
        pairs = zip(self.core.group_query, self.core.group_role, strict=True)
        return [(queries[q], roles[r]) for q, r in pairs]

    @property
    def slots(self) -> Int32:
        """i32[G, K, D] -> the first row of a trajectory, or -1 where nothing is trained; a trajectory of multiplicity m
        stands in m slots."""
        return self.core.slots

    @property
    def group_rollouts(self) -> Int32:
        """K' of every group: its rollouts with d_k > 0, i32[G]."""
        return self.core.group_rollouts

    @property
    def n_rollouts(self) -> int:
        """K' of the batch, summed over groups."""
        return int(self.core.group_rollouts.sum())

    @property
    def denominator(self) -> float:
        """What a sequence-mean loss divides by, over all ranks: K'; K x groups with empty="count"; the number of
        invocations with sequence_weight="per_invocation"."""
        if self._options["sequence_weight"] == "per_invocation":
            return float(self.unique)
        if self._options["empty"] == "count":
            return float(len(self.groups) * self._options["k"])
        return float(self.n_rollouts)

    @property
    def weighted_tokens(self) -> float:
        """sum over rows of weight |o|, |o| = tokens with loss_mask 1, over all ranks: what a token-mean loss divides
        by."""
        return float((self.rows.weight * self.rows.active).sum())

    @cached_property
    def padded_shapes(self) -> Int32:
        """(rows, width) of every right-padded micro-batch, i32[dp, n_padded, 2]; rows x width <= capacity, where
        prefixes are shared only the distinct entering tokens are."""
        shape = (self.core.dp, self.core.n_padded)
        rows = np.diff(self.core.padded_offsets).reshape(shape)
        return np.stack([rows, self.core.padded_width.reshape(shape)], axis=-1)

    def buffer_shapes(
        self, *, advantages: bool = False, position_ids: bool = False
    ) -> dict[str, tuple[tuple[int, ...], npt.DTypeLike]]:
        """Name -> (shape, dtype) of what Batcher.write fills for one rank."""
        n, c, s = self.n_mb, self.capacity, self.max_segments
        tokens: dict[str, npt.DTypeLike] = dict(_PACKED_TOKENS)
        if advantages:
            tokens["advantages"] = np.float32
        if position_ids:
            tokens["position_ids"] = np.int32
        shapes: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {k: ((n, c), t) for k, t in tokens.items()}
        shapes |= {k: ((n, s), t) for k, t in _SEGMENTS.items()}
        shapes["cu_seqlens"] = ((n, s + 2), np.int32)
        shapes["n_seg"] = shapes["max_seqlen"] = ((n,), np.int32)
        return shapes

    def buffers(self, *, advantages: bool = False, position_ids: bool = False) -> Buffers:
        """Fresh buffers for Batcher.write of one rank; reuse them where you can, a fresh allocation costs as much as
        the work."""
        return _allocate(self.buffer_shapes(advantages=advantages, position_ids=position_ids))

    def padded_buffers(self, rank: int, micro_batch: int) -> Buffers:
        """Fresh buffers for Batcher.write_padded, of exactly the needed shape; with token_advantages also `advantages`
        f32[R,W]."""
        rows, width = (int(x) for x in self.padded_shapes[rank, micro_batch])
        out: Buffers = {name: np.empty((rows, width), dtype) for name, dtype in _PACKED_TOKENS.items()}
        if self._options["token_advantages"]:
            out["advantages"] = np.empty((rows, width), np.float32)
        out |= {name: np.empty(rows, dtype) for name, dtype in _SEGMENTS.items()}
        return out | {"lengths": np.empty(rows, np.int32)}


def _allocate(shapes: dict[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> Buffers:
    """Arrays on 64-byte boundaries of one allocation: together they are large enough for the huge pages that numpy asks
    for, which the byte masks of one rank alone often are not."""
    sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in shapes.items()}
    slab = np.empty(sum(-(-size // _LINE) * _LINE for size in sizes.values()) + _LINE, np.uint8)
    at = -slab.ctypes.data % _LINE
    out: Buffers = {}
    for name, (shape, dtype) in shapes.items():
        out[name] = slab[at : at + sizes[name]].view(dtype).reshape(shape)
        at += -(-sizes[name] // _LINE) * _LINE
    return out
