"""From arriving trajectories to fixed-shape batches: groups, alignment, packing, assembly.

    batcher = Batcher(k=8, d_max=3, capacity=4096, role="sub", seed=run_seed)
    batcher.add(query, rollout, invocation, traj_id, tokens, loss_mask, logprobs, advantage, policy_version)
    batcher.seal(query, rollout, d)                # d = 0 is legal
    plan = batcher.plan(step, n_groups=8)          # pure: reads the batcher, changes nothing
    for micro_batch in range(plan.n_padded):
        batch = plan.padded_buffers(rank, micro_batch)
        batcher.write_padded(plan, rank, micro_batch, batch)
    for query in plan.queries:
        batcher.drop(query)                        # frees the arena

The work happens in C++ (csrc/), without the GIL; token data goes from the caller's arrays into the arena and from there
into the caller's buffers, never through Python objects. torch tensors share memory through `tensor.numpy()` (inputs and
outputs) or `torch.from_numpy`.

A row is one segment of a trajectory: of a trajectory that has one, the whole. `seg_weight` is w(k,i) of mgrpo.alignment
divided by the number of the trajectory's rows, *before* any token normalisation: a loss multiplies it with the token
mask and its own normaliser (1/|o|, 1/tokens, ...) and divides by `plan.denominator`, which is K' with
sequence_weight="per_rollout", the number of rollouts with d_k > 0.

Advantages are the caller's (mgrpo/algorithms), one a trajectory or one a token. Those that depend on the weights of the
alignment take them from mgrpo.align, which draws the same as plan().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mgrpo import _C
from mgrpo.alignment import Mode, SequenceWeight, query_name
from mgrpo.batcher.plan import Buffers, Plan
from mgrpo.batcher.prefix_tree import MIN_SAVED
from mgrpo.types import MAIN, Float32, Int32, UInt8

Empty = Literal["mask", "count", "error"]
Overlong = Literal["error", "truncate", "drop"]

_WORD = 2**64
_NOT_IN_STATE = ("threads", "arena_bytes")  # they do not change what is computed


class Batcher:
    """Collects rollout groups of one trainer and turns them into batches. Thread-safe.

    k: rollouts a query. d_max: invocations a rollout after alignment; an int for the single role `role`, or a
    mapping role -> d_max for a trainer that serves several roles. capacity: tokens a micro-batch. dp:
    data-parallel ranks. mode, sequence_weight: see mgrpo.alignment. token_advantages: trajectories have an advantage of
    each token. empty: a rollout with d_k = 0 is masked and leaves the denominator ("mask"), is
    masked but counted in it ("count"), or is refused ("error"). overlong: a segment above capacity is
    refused ("error"), cut at its end ("truncate") or takes its trajectory out of the group like a failed one ("drop").
    cost: (a, b) of the cost a*L + b*L^2 of a sequence, which the packer balances over ranks. max_segments: sequences a
    micro-batch; None = as many as fit. arena_bytes: bound on token data (9 bytes a token, 13 with
    token_advantages); a full arena refuses with ArenaFullError. vocab_size: bound on token ids. clock: seconds, for
    expire(). Raises ValueError naming the option.
    """

    def __init__(
        self,
        k: int,
        d_max: int | Mapping[str, int],
        capacity: int,
        dp: int = 1,
        *,
        role: str = MAIN,
        mode: Mode = "weights",
        sequence_weight: SequenceWeight = "per_rollout",
        empty: Empty = "mask",
        overlong: Overlong = "error",
        token_advantages: bool = False,
        cost: tuple[float, float] = (1.0, 1 / 61440),
        max_segments: int | None = None,
        seed: int = 0,
        threads: int = 2,
        arena_bytes: int = 1 << 30,
        vocab_size: int | None = None,
        pad_id: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        depths = {role: d_max} if isinstance(d_max, int) else dict(d_max)
        if max_segments is not None and max_segments < 1:
            raise ValueError(f"max_segments={max_segments} is below 1")
        self.roles = tuple(depths)
        self.options: dict[str, Any] = {
            "k": k,
            "roles": list(depths),
            "d_max": list(depths.values()),
            "capacity": capacity,
            "dp": dp,
            "mode": mode,
            "sequence_weight": sequence_weight,
            "empty": empty,
            "overlong": overlong,
            "token_advantages": token_advantages,
            "cost": cost,
            "max_segments": max_segments or 0,
            "seed": seed % _WORD,
            "threads": threads,
            "arena_bytes": arena_bytes,
            "vocab_size": vocab_size or 0,
            "pad_id": pad_id,
        }
        self._clock = clock
        self._core = _C.Batcher(self.options)

    def _role(self, role: str | None) -> str:
        if role is None:
            if len(self.roles) > 1:
                raise ValueError(f"this batcher serves {list(self.roles)}: name the role")
            return self.roles[0]
        return role

    def add(
        self,
        query: str | int,
        rollout: int,
        invocation: int,
        traj_id: int,
        tokens: Int32,
        loss_mask: UInt8,
        logprobs: Float32,
        advantage: float | Float32,
        policy_version: int,
        role: str | None = None,
        segment_starts: Sequence[int] = (0,),
    ) -> bool:
        """Copy one trajectory of L tokens into the arena: tokens i32[L], loss_mask u8[L] of 0 and 1, logprobs
        f32[L]; advantage a finite number, with token_advantages f32[L], which is not read where loss_mask is 0.
        segment_starts: offsets of its segments, the first 0. Each is a row of its own and bounded by capacity; those
        with a trainable token share the trajectory's weight equally, the others have no row.

        traj_id >= 0 is unique in the batcher. False for a re-delivery (same id, same content), which is only
        counted. Raises TrajectoryError and its subclasses; a rejected trajectory changes nothing.
        """
        name = query_name(query)
        return self._core.add(
            name, self._role(role), rollout, invocation, traj_id, tokens, loss_mask, logprobs, advantage,
            policy_version, segment_starts, self._clock(),
        )  # fmt: skip

    def add_many(
        self,
        queries: Sequence[str | int],
        *,
        rollouts: Int32,
        invocations: Int32,
        traj_ids: npt.NDArray[np.int64],
        offsets: npt.NDArray[np.int64],
        tokens: Int32,
        loss_mask: UInt8,
        logprobs: Float32,
        advantages: Float32,
        policy_versions: Int32,
        role: str | None = None,
        segment_starts: Sequence[Sequence[int]] = (),
    ) -> int:
        """As add() for n trajectories in columns: trajectory i is [offsets[i], offsets[i+1]) of the token
        columns. advantages f32[n], with token_advantages a token column. segment_starts: of each trajectory, in its own
        tokens; none where each is one segment.

        Returns how many were new. When one is rejected, those before it stay and the error names it.
        """
        columns: dict[str, Any] = {
            "rollouts": rollouts, "invocations": invocations, "traj_ids": traj_ids, "offsets": offsets,
            "tokens": tokens, "loss_mask": loss_mask, "logprobs": logprobs, "advantages": advantages,
            "policy_versions": policy_versions, "segment_starts": segment_starts,
        }  # fmt: skip
        return self._core.add_many([query_name(q) for q in queries], self._role(role), columns, self._clock())

    def seal(self, query: str | int, rollout: int, d: int, role: str | None = None) -> None:
        """Rollout `rollout` has exactly d invocations. Idempotent; another d raises TrajectoryConflictError."""
        self._core.seal(query_name(query), self._role(role), rollout, d, self._clock())

    def fail(self, query: str | int, rollout: int, invocation: int, role: str | None = None) -> None:
        """This invocation will never come (engine, tool or judge failed): it leaves its group, d_k shrinks by
        one."""
        self._core.fail(query_name(query), self._role(role), rollout, invocation, self._clock())

    def ready(self) -> list[str]:
        """Queries whose k rollouts are sealed and complete in every role, in canonical order ("12/3" <
        "12/10")."""
        return self._core.ready()

    def wait_ready(self, wanted: int | Sequence[str | int], timeout: float) -> bool:
        """Wait until `wanted` queries (a number), or all the named ones, are ready; False after timeout
        seconds."""
        n, names = (wanted, []) if isinstance(wanted, int) else (0, [query_name(q) for q in wanted])
        return self._core.wait_ready(n, names, timeout)

    def drop(self, query: str | int) -> bool:
        """Forget a query and free its tokens; False when it is unknown."""
        return self._core.drop(query_name(query))

    def expire(self, max_age: float) -> list[str]:
        """Forget the incomplete queries opened more than max_age seconds ago; returns their names."""
        return self._core.expire(max_age, self._clock())

    def plan(
        self,
        step: int,
        n_groups: int | None = None,
        *,
        queries: Sequence[str | int] | None = None,
        skip_zero: bool = False,
        share_prefixes: bool = False,
        hold_prefixes: bool = False,
    ) -> Plan:
        """Plan a batch of the named queries, or of the first n_groups ready ones (None: all), in canonical order.

        Pure: the same content and step give the same plan. skip_zero keeps rows without a gradient (every
        trained token has advantage exactly 0) out of the micro-batches, for losses without a KL or entropy term.

        share_prefixes lays right-padded micro-batches out for a policy that computes what their rows have in common
        once (mgrpo.batcher.prefix_tree). Of a row of L tokens the first max(L - 1, 1) enter the model; the distinct
        entering tokens of a micro-batch are at most capacity, whatever its rows x width. Rows with a common prefix stay
        together where they fit; otherwise their tree is cut at branches and each piece repeats what leads to it. In a
        micro-batch, a row whose tokens others go on from comes behind these. Where no two rows share anything, the
        layout is the same as without.

        hold_prefixes (with dp 1) lets the micro-batches of one cut tree follow one another, without other rows, so that
        its root, which all of them begin with (plan.prefixes, plan.prefix_id), is computed once for all of them. It
        counts towards the capacity of each. The first row of each has all of it; a row may end within it.

        Raises ValueError when a query is not ready, and for hold_prefixes with another dp or without share_prefixes.
        """
        if hold_prefixes and not (share_prefixes and self.options["dp"] == 1):
            raise ValueError(
                f"hold_prefixes wants share_prefixes=True and dp=1, not share_prefixes={share_prefixes} and "
                f"dp={self.options['dp']}"
            )
        if queries is None:
            names = self.ready()
            if n_groups is not None and len(names) < n_groups:
                raise ValueError(f"plan wants {n_groups} groups, {len(names)} are ready")
            names = names[:n_groups]
        else:
            names = [q if type(q) is str else query_name(q) for q in queries]
        min_saved = MIN_SAVED if share_prefixes else 0
        return Plan(self._core.plan(step % _WORD, names, skip_zero, min_saved, hold_prefixes), self.options)

    def write(self, plan: Plan, rank: int, out: Mapping[str, Any]) -> None:
        """Write the micro-batches of one rank, packed, into the caller's buffers (plan.buffers() makes them).

        ids i32[n,C] and seg_weight f32[n,S] are required, the others optional: loss_mask u8[n,C], logprobs
        f32[n,C], advantages f32[n,C], position_ids i32[n,C], cu_seqlens i32[n,S+2], n_seg i32[n], max_seqlen
        i32[n], seg_advantage f32[n,S], seg_traj i64[n,S] and seg_row i32[n,S] (index into plan.rows; both -1
        = padding). n >= plan.n_mb (the rest is blank), C >= plan.capacity, S >= plan.max_segments. The
        padding tail is a segment of its own in cu_seqlens (and in max_seqlen), the entries after it repeat C.
        Raises TypeError/ValueError/KeyError naming the buffer, TrajectoryError (kind "dropped") for a dropped
        query.
        """
        self._core.write(plan.core, rank, _as_numpy(out))

    def write_padded(self, plan: Plan, rank: int, micro_batch: int, out: Mapping[str, Any]) -> None:
        """Write one micro-batch as right-padded rows, of similar length unless they share prefixes; plan.padded_shapes
        holds (rows, width).

        ids i32[R,W] is required; loss_mask u8[R,W], logprobs f32[R,W], advantages f32[R,W], lengths i32[R],
        seg_advantage f32[R], seg_weight f32[R], seg_traj i64[R], seg_row i32[R]. R and W may be larger than
        needed: the rest is padding.
        """
        self._core.write_padded(plan.core, rank, micro_batch, _as_numpy(out))

    @property
    def used_bytes(self) -> int:
        """Arena bytes in use."""
        return self._core.used_bytes

    @property
    def counters(self) -> dict[str, int]:
        """accepted, redelivered, overlong (dropped), truncated, failed, expired (queries)."""
        return self._core.counters

    def __len__(self) -> int:
        """Queries held, ready or not."""
        return self._core.n_queries

    def state_dict(self) -> dict[str, Any]:
        """Options, half-filled groups and counters, as plain lists and numpy columns."""
        options = {key: value for key, value in self.options.items() if key not in _NOT_IN_STATE}
        return {"options": options, **self._core.save_state(self._clock())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore into an empty batcher with the same options; raises ValueError naming the first that
        differs."""
        for key, value in state["options"].items():
            mine = self.options[key]
            if (tuple(value) if isinstance(value, (list, tuple)) else value) != (
                tuple(mine) if isinstance(mine, (list, tuple)) else mine
            ):
                raise ValueError(f"state was saved with {key}={value!r}, this batcher has {mine!r}")
        self._core.load_state({k: v for k, v in state.items() if k != "options"}, self._clock())


def _as_numpy(out: Mapping[str, Any]) -> Buffers:
    """torch CPU tensors (pinned or not) as views of their memory; arrays as they are."""
    return {
        k: v.numpy() if not isinstance(v, np.ndarray) and hasattr(v, "numpy") else v for k, v in out.items()
    }
