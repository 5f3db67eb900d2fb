"""Group-relative advantages.

    mu = sum w R / sum w,  var = sum w (R - mu)^2 / sum w   over the members of a group, and by estimator
    grpo     A = (R - mu) / (sqrt(var) + eps)
    dr_grpo  A = R - mu
    rloo     A = R - (sum of the others' w R / sum of the others' w)
    batch    A = (R - mu) / (sqrt(var of the whole batch) + eps)

Source: M-GRPO (arXiv 2511.13288), Dr. GRPO, RLOO. Choices of ours: 1. the variance is the population's, so
that a weight of m equals m copies. 2. A group of one, and a group whose rewards are all equal (max == min),
get exactly 0. 3. A row of weight 0 is no member of its group and gets 0. 4. Sums are exact on a grid 2^-31 of
the group's spread or finer, so the order of rows cannot change a bit of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo.ops import check
from mgrpo.ops.backend import choose

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "batch")


def group_advantage(
    rewards: Tensor,
    group_id: Tensor,
    weight: Tensor | None = None,
    *,
    estimator: str = "grpo",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Advantages (N,) of rewards (N,) within groups.

    rewards float (N,); group_id int32 (N,), any values, groups need not be contiguous; weight float (N,) or
    None (1). Permuting the rows permutes the result bit for bit. Not differentiable.

    Raises TypeError/ValueError naming the argument: shapes, dtypes, devices, an unknown estimator, eps < 0,
    and (on the CPU) rewards that are not finite and weights that are negative or not finite. On a GPU such
    rewards give NaN.
    """
    check.floating("rewards", rewards, (None,), rewards)
    check.tensor("group_id", group_id, (rewards.shape[0],), (torch.int32,), rewards)
    if weight is not None:
        check.floating("weight", weight, (rewards.shape[0],), rewards)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r} is not one of {', '.join(ESTIMATORS)}")
    if not eps >= 0:
        raise ValueError(f"eps: {eps} is below 0")
    backend = choose(impl, rewards.device, rewards.dtype)
    if backend != "cpu":  # the C++ looks at the values itself, in the pass it makes anyway
        check.finite("rewards", rewards)
        check.vote("weight", weight, rewards.shape[0], rewards)
    if backend != "reference":
        from mgrpo.ops import library

        w = None if weight is None else weight.detach()
        out: Tensor = library.group_advantage(rewards.detach(), group_id, w, estimator, eps, backend)
        return out
    with torch.no_grad():
        return reference(rewards, group_id, weight, estimator, eps)


def reference(rewards: Tensor, group_id: Tensor, weight: Tensor | None, estimator: str, eps: float) -> Tensor:
    """The definition, in float64 throughout; the result has the dtype of `rewards`."""
    _, group = torch.unique(group_id, return_inverse=True)
    r = rewards.double()
    w = torch.ones_like(r) if weight is None else weight.double()
    stats = _Groups(r, w, group)
    centred = r - stats.mean[group]
    if estimator == "grpo":
        out = centred / (stats.std[group] + eps)
    elif estimator == "dr_grpo":
        out = centred
    elif estimator == "rloo":
        others = stats.total[group] - w
        out = torch.where(others > 0, centred * stats.total[group] / others, 0.0)
    else:
        whole = _Groups(r, w, torch.zeros_like(group))
        out = centred / (whole.std + eps)
    return torch.where(stats.varied[group] & (w > 0), out, 0.0).to(rewards.dtype)


class _Groups:
    """Weighted moments of every group, (G,) float64: total weight, mean, std, and whether max > min."""

    def __init__(self, r: Tensor, w: Tensor, group: Tensor) -> None:
        count = int(group.max()) + 1 if group.numel() else 0
        member = w > 0
        index = group[member]
        size = r.new_zeros(count).index_add(0, index, torch.ones_like(r[member]))
        low = r.new_full((count,), float("inf")).scatter_reduce(0, index, r[member], "amin")
        high = r.new_full((count,), -float("inf")).scatter_reduce(0, index, r[member], "amax")
        heaviest = r.new_zeros(count).scatter_reduce(0, index, w[member], "amax")
        self.varied = high > low
        low = torch.where(self.varied, low, 0.0)
        spread = torch.where(self.varied, high - low, 1.0)
        self.total = _exact_sum(w, group, size * heaviest)
        safe = torch.where(self.total > 0, self.total, 1.0)
        offset = torch.where(member, r - low[group], 0.0)
        shift = _exact_sum(w * offset, group, size * heaviest * spread) / safe
        self.mean = low + shift
        deviation = torch.where(member, offset - shift[group], 0.0)
        bound = size * heaviest * spread.square()
        self.std = (_exact_sum(w * deviation.square(), group, bound) / safe).sqrt()


def _exact_sum(x: Tensor, group: Tensor, bound: Tensor) -> Tensor:
    """(G,) sums of x (N,), independent of order: terms are first rounded to a grid on which every partial sum
    is exact.

    bound (G,) is at least the sum of |x| in each group.
    """
    # x + anchor - anchor rounds x to ulp(anchor); with anchor = 1.5 * 2^k >= bound every partial sum fits 53
    # bits.
    anchor = 1.5 * torch.exp2(torch.ceil(torch.log2(bound.clamp(min=1e-280))) + 1.0)
    terms = (x + anchor[group]) - anchor[group]
    return torch.zeros_like(bound).index_add(0, group, terms)
