"""Rows of unequal width in one batch: how to share forwards without computing much padding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def width_groups(width: Int64, overhead: int) -> list[Int64]:
    """Partition rows by width: least sum over groups of overhead + rows * max width.

    width (R,) >= 1; overhead: what one more forward costs, in token positions. Returns increasing row
    indices, the groups by increasing width. A best partition cuts the sorted widths, so a dynamic programme
    over cuts is exact.
    """
    if width.min() == width.max():
        return [np.arange(len(width))]
    order = np.argsort(width, kind="stable")
    sizes, starts = np.unique(width[order], return_index=True)
    bounds = np.append(starts, len(width))  # rows bounds[i] .. bounds[i + 1] of the order have width sizes[i]
    best, cut = [0], [0]  # best[j]: cost of the j smallest widths; cut[j]: where its last group starts
    for j in range(1, len(sizes) + 1):
        costs = [best[i] + overhead + int(bounds[j] - bounds[i]) * int(sizes[j - 1]) for i in range(j)]
        cut.append(int(np.argmin(costs)))
        best.append(costs[cut[-1]])
    groups, j = [], len(sizes)
    while j:
        groups.append(np.sort(order[bounds[cut[j]] : bounds[j]]))
        j = cut[j]
    return groups[::-1]
