"""Trajectory alignment to D_max: which invocations of a rollout are trained on, how often, with which weight.

Rollout k of a query has d_k >= 0 invocations of a sub-agent role; arXiv 2511.13288 makes every rollout contribute
exactly D_max of them: duplicate at random when d_k < D_max, drop at random when d_k > D_max. Let m(k,i) be the number
of copies. The weight w(k,i) of one kept invocation, all its copies together, before any token normalisation:

    weights    m / D_max                the paper's draw, every distinct trajectory computed once (default)
    duplicate  m / D_max                the same draw, copies materialised (1 / D_max each)
    expected   1 / min(d_k, D_max)      the expectation of the draw over its duplicates
    none       1 / d_k, or 1 with sequence_weight="per_invocation"

Under sequence_weight="per_rollout" the weights of one rollout sum to 1, so K' = number of rollouts with d_k > 0 is the
denominator of the loss and of the group statistics.

Ours where the paper is silent: the draw is a pure function of (seed, step, query, rollout, role) through
Philox4x32-10; every invocation gets floor(D_max / d_k) copies, and a random subset one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mgrpo._C import multiplicities
from mgrpo.types import Int32

Mode = Literal["weights", "duplicate", "expected", "none"]
SequenceWeight = Literal["per_rollout", "per_invocation"]


@dataclass(frozen=True, slots=True)
class Alignment:
    """The kept invocations of one group, in canonical order (by rollout, then invocation). n of them."""

    rollout: Int32  # (n,)
    invocation: Int32  # (n,)
    multiplicity: Int32  # (n,) copies, >= 1
    weight: npt.NDArray[np.float64]  # (n,) w(k,i), all copies together
    slots: Int32  # (K, D) -> index into the arrays above, or -1; D = d_max, in mode "none" max d_k
    n_rollouts: int  # K': rollouts with d_k > 0


def query_name(query: str | int) -> str:
    """Queries are named by text; an int is its decimal text, so 12 and "12" are the same query."""
    if isinstance(query, bool) or not isinstance(query, (str, int)):
        raise TypeError(f"query {query!r} is a {type(query).__name__}, expected str or int")
    return query if isinstance(query, str) else str(query)


def align(
    counts: Sequence[int],
    *,
    d_max: int,
    seed: int,
    step: int,
    query: str | int,
    role: str = "sub",
    mode: Mode = "weights",
    sequence_weight: SequenceWeight = "per_rollout",
) -> Alignment:
    """Align one group: counts[k] = d_k of its K rollouts. The same arguments give the same answer on any machine.

    seed and step are taken modulo 2^64. Raises ValueError for d_max < 1, a negative count or an unknown
    option.
    """
    if d_max < 1:
        raise ValueError(f"d_max={d_max} is below 1")
    if any(d < 0 for d in counts):
        raise ValueError(f"counts {list(counts)} has a negative d_k")
    if sequence_weight not in ("per_rollout", "per_invocation"):
        raise ValueError(f"sequence_weight {sequence_weight!r} is not one of per_rollout, per_invocation")
    if sequence_weight == "per_invocation" and mode != "none":
        raise ValueError(f"sequence_weight='per_invocation' belongs to mode='none', not {mode!r}")
    word = 2**64
    copies = multiplicities(list(counts), seed % word, step % word, query_name(query), role, d_max, mode)
    kept = [(k, i, m) for k, row in enumerate(copies) for i, m in enumerate(row) if m]
    depth = d_max if mode != "none" else max([1, *counts])
    slots = np.full((len(counts), depth), -1, np.int32)
    used = [0] * len(counts)
    for row, (k, _, m) in enumerate(kept):
        slots[k, used[k] : used[k] + m] = row
        used[k] += m
    weight = [_weight(m, counts[k], d_max, mode, sequence_weight) for k, _, m in kept]
    rollout, invocation, multiplicity = np.array(kept, np.int32).reshape(-1, 3).T.copy()
    n_rollouts = sum(d > 0 for d in counts)
    return Alignment(rollout, invocation, multiplicity, np.array(weight, np.float64), slots, n_rollouts)


def _weight(m: int, d: int, d_max: int, mode: Mode, sequence_weight: SequenceWeight) -> float:
    if mode in ("weights", "duplicate"):
        return m / d_max
    if mode == "expected":
        return 1 / min(d, d_max)
    return 1 / d if sequence_weight == "per_rollout" else 1.0
