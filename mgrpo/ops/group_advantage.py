"""Group-relative advantages.

    mu = sum w R / sum w,  var = sum w (R - mu)^2 / sum w   over the members of a group, and by estimator
    grpo     A = (R - mu) / (sqrt(var) + eps)
    dr_grpo  A = R - mu
    rloo     A = R - (sum of the others' w R / sum of the others' w)
    batch    A = (R - mu) / (sqrt(var of the whole batch) + eps)

With unbiased=True grpo and batch divide by the sample deviation, var = sum w (R - mu)^2 / (sum w - sum w^2 / sum w).
With equal weights that is n - 1, what torch.std, and so TRL, verl and slime, divide by.

Source: M-GRPO (arXiv 2511.13288), Dr. GRPO, RLOO. Choices of ours: 1. the variance is the population's, so
that a weight of m equals m copies. 2. A group of one, and a group whose rewards are all equal, get exactly 0.
Equal means max - min <= EQUAL_WITHIN * max |R|: the same parts summed in another order differ by a few ulp, and an
estimator that divides by the deviation would make advantages of about 1 of it. 3. A row of weight 0 is no member
of its group and gets 0. 4. Sums are exact on a grid 2^-31 of the group's spread or finer, so the order of rows
cannot change a bit of the result. 5. Moments are taken of rewards and weights divided by a power of two, the
group's own: no square overflows or vanishes, and ordinary numbers keep their bits. 6. The sample variance is unbiased
for independent rewards of one variance, whatever their weights: E sum w (R - mu)^2 = var (sum w - sum w^2 / sum w). To
take the weights for counts, sum w - 1, would make new samples of a trajectory's copies, depend on the unit of the
weights, and be 0 for the calls of one rollout. So here a weight of m is not m copies, as with rloo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo.config.loss import WITHOUT_DEVIATION
from mgrpo.ops import check
from mgrpo.ops.backend import choose
from mgrpo.ops.encoding import check_name

EQUAL_WITHIN = 8 * 2.0**-23
"""Rewards of a group that differ by no more than this part of the largest are equal: 8 ulp of float32, whatever the
dtype, since every backend must agree on which groups train. csrc/group_advantage.hpp and the kernels hold the same
number."""


def group_advantage(
    rewards: Tensor,
    group_id: Tensor,
    weight: Tensor | None = None,
    *,
    estimator: str = "grpo",
    eps: float = 1e-6,
    unbiased: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Advantages (N,) of rewards (N,) within groups.

    rewards float (N,); group_id int32 or int64 (N,), any values, groups need not be contiguous; weight float (N,) or
    None (1). unbiased: divide by the sample deviation instead of the population's. Permuting the rows permutes the
    result bit for bit. Not differentiable.

    Raises TypeError/ValueError naming the argument: shapes, dtypes, devices, an unknown estimator, unbiased with an
    estimator that has no deviation, eps < 0, and (on the CPU) rewards that are not finite or beyond half of their
    dtype's range, whose differences would not fit it, and weights that are negative or not finite. On a GPU such
    rewards give NaN or infinities.
    """
    check.floating("rewards", rewards, (None,), rewards)
    check.tensor("group_id", group_id, (rewards.shape[0],), check.OFFSETS, rewards)
    if weight is not None:
        check.floating("weight", weight, (rewards.shape[0],), rewards)
    check_name("estimator", estimator)
    if unbiased and estimator in WITHOUT_DEVIATION:
        raise ValueError(
            f"unbiased: True has no effect with estimator {estimator!r}, which divides by no deviation"
        )
    if not eps >= 0:
        raise ValueError(f"eps: {eps} is below 0")
    backend = choose(impl, rewards.device, rewards.dtype)
    if backend != "cpu":  # the C++ looks at the values itself, in the pass it makes anyway
        check.rewards(rewards)
        check.weights("weight", weight, rewards.shape[0], rewards)
    if backend != "reference":
        from mgrpo.ops import library

        w = None if weight is None else weight.detach()
        out: Tensor = library.group_advantage(
            rewards.detach(), group_id, w, estimator, eps, unbiased, backend
        )
        return out
    with torch.no_grad():
        return reference(rewards, group_id, weight, estimator, eps, unbiased)


def reference(
    rewards: Tensor,
    group_id: Tensor,
    weight: Tensor | None,
    estimator: str,
    eps: float,
    unbiased: bool = False,
) -> Tensor:
    """The definition, in float64 throughout; the result has the dtype of `rewards`."""
    _, group = torch.unique(group_id, return_inverse=True)
    r = rewards.double()
    w = torch.ones_like(r) if weight is None else weight.double()
    stats = _Groups(r, w, group, unbiased)
    exponent = stats.exponent[group]
    if estimator == "grpo":
        out = stats.centred / (stats.std[group] + _times_power(torch.full_like(r, eps), -exponent))
    elif estimator == "dr_grpo":
        out = _times_power(stats.centred, exponent)
    elif estimator == "rloo":
        others = stats.total[group] - stats.weight
        out = torch.where(others > 0, stats.centred * stats.total[group] / others, 0.0)
        out = _times_power(out, exponent)
    elif estimator == "batch":
        whole = _Groups(r, w, torch.zeros_like(group), unbiased)
        unit = whole.exponent[torch.zeros_like(group)]
        std = whole.std[torch.zeros_like(group)] + _times_power(torch.full_like(r, eps), -unit)
        out = _times_power(stats.centred, exponent - unit) / std
    else:
        raise ValueError(f"estimator: {estimator!r} has no formula")
    return torch.where(stats.varied[group] & (w > 0), out, 0.0).to(rewards.dtype)


class _Groups:
    """Weighted moments of every group, float64, in units of the group's own 2^exponent.

    exponent int64 (G,); centred (N,), reward less the group's mean; std (G,); total (G,) of the weights as `weight`
    (N,) has them, in units of their own; varied bool (G,): the rewards are not equal.
    """

    def __init__(self, r: Tensor, w: Tensor, group: Tensor, unbiased: bool) -> None:
        count = int(group.max()) + 1 if group.numel() else 0
        member = w > 0
        index = group[member]
        size = r.new_zeros(count).index_add(0, index, torch.ones_like(r[member]))
        low = r.new_full((count,), float("inf")).scatter_reduce(0, index, r[member], "amin")
        high = r.new_full((count,), -float("inf")).scatter_reduce(0, index, r[member], "amax")
        magnitude = torch.maximum(low.abs(), high.abs())
        self.varied = high - low > EQUAL_WITHIN * magnitude
        some = high > low
        self.exponent = _exponent(torch.where(some, magnitude, 1.0))
        low = _times_power(torch.where(some, low, 0.0), -self.exponent)
        high = _times_power(torch.where(some, high, 1.0), -self.exponent)
        heaviest = r.new_zeros(count).scatter_reduce(0, index, w[member], "amax")
        heaviness = _exponent(torch.where(heaviest > 0, heaviest, 1.0))
        self.weight = _times_power(w, -heaviness[group])
        heaviest = _times_power(heaviest, -heaviness)
        self.total = _exact_sum(self.weight, group, size * heaviest)
        safe = torch.where(self.total > 0, self.total, 1.0)
        spread = high - low
        offset = torch.where(member, _times_power(r, -self.exponent[group]) - low[group], 0.0)
        shift = _exact_sum(self.weight * offset, group, size * heaviest * spread) / safe
        self.centred = torch.where(member, offset - shift[group], 0.0)
        bound = size * heaviest * spread.square()
        square = _exact_sum(self.weight * self.centred.square(), group, bound)
        if unbiased:
            squares = _exact_sum(
                torch.where(member, self.weight.square(), 0.0), group, size * heaviest.square()
            )
            spare = self.total - squares / safe
            # Beside a weight that outweighs its group to the last bit the others are no second member: A = 0.
            self.std = torch.where(spare > 0, square / torch.where(spare > 0, spare, 1.0), torch.inf).sqrt()
        else:
            self.std = (square / safe).sqrt()


def _exponent(x: Tensor) -> Tensor:
    """int64 e with 2^(e - 1) <= x < 2^e, for x > 0 in float64, subnormal ones too."""
    return torch.frexp(x)[1].long()


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent, exact where the result is a normal number; in two steps, since 2^exponent itself may not be
    one."""
    half = exponent // 2
    for part in (half, exponent - half):
        x = x * ((part.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
    return x


def _exact_sum(x: Tensor, group: Tensor, bound: Tensor) -> Tensor:
    """(G,) sums of x (N,), independent of order: terms are first rounded to a grid on which every partial sum is exact.

    bound (G,) is at least the sum of |x| in each group.
    """
    # x + anchor - anchor rounds x to ulp(anchor); with anchor = 1.5 * 2^k >= bound every partial sum fits 53 bits.
    anchor = 1.5 * torch.exp2(torch.ceil(torch.log2(bound.clamp(min=1e-280))) + 1.0)
    terms = (x + anchor[group]) - anchor[group]
    return torch.zeros_like(bound).index_add(0, group, terms)
