"""Group-relative advantages on the device (definition: the module of the same name among the ops).

Every sum is over terms first rounded to a grid, a power of two set by the group's range, on which all partial
sums are exact in float64: the order of rows, blocks and lanes cannot change a bit.
"""

import triton
import triton.language as tl

GRPO = tl.constexpr(0)
DR_GRPO = tl.constexpr(1)
RLOO = tl.constexpr(2)
BATCH = tl.constexpr(3)
EQUAL_WITHIN = tl.constexpr(8.0 * 2.0**-23)  # the ops' module of the same name has the reason


@triton.jit
def anchor_for(bound):
    """1.5 * 2^k with 2^k > bound (float64): x + anchor - anchor rounds x to the grid of exact sums."""
    bits = tl.maximum(bound, 1e-280).to(tl.int64, bitcast=True)
    power = (((bits >> 52) + 2) << 52).to(tl.float64, bitcast=True)
    return 1.5 * power


@triton.jit
def snapped_sum(x, anchor):
    """Exact sum of x (float64) rounded to the anchor's grid."""
    return tl.sum((x + anchor) - anchor, axis=0)


@triton.jit
def load_members(rewards, weight, group_id, group, at, end, MATCH: tl.constexpr, WEIGHTED: tl.constexpr):
    """(reward, weight, membership) of rows `at`, float64; a member lies before `end`, has a weight, and (MATCH) is
    of `group`."""
    inside = at < end
    r = tl.load(rewards + at, mask=inside, other=0.0).to(tl.float64)
    w = tl.full(r.shape, 1.0, tl.float64)
    if WEIGHTED:
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float64)
    member = inside & (w > 0)
    if MATCH:
        member = member & (tl.load(group_id + at, mask=inside, other=0) == group)
    return r, tl.where(member, w, 0.0), member


@triton.jit
def moments(
    rewards,
    weight,
    group_id,
    group,
    begin,
    end,
    MATCH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    UNBIASED: tl.constexpr = False,
):
    """(low, varied, total, shift, deviation) of one group among the rows [begin, end), float64 scalars.

    shift is the mean less `low`. A group of one member, or of rewards that are equal but for rounding, is not varied.
    With UNBIASED the deviation is the sample's.
    """
    lane = tl.arange(0, BLOCK)
    inf = float("inf")
    low = tl.full((BLOCK,), inf, tl.float64)
    high = tl.full((BLOCK,), -inf, tl.float64)
    heaviest = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for i in range(begin, end, BLOCK):
        r, w, member = load_members(rewards, weight, group_id, group, i + lane, end, MATCH, WEIGHTED)
        low = tl.minimum(low, tl.where(member, r, inf))
        high = tl.maximum(high, tl.where(member, r, -inf))
        heaviest = tl.maximum(heaviest, w)
        count += tl.where(member, 1.0, 0.0).to(tl.float64)
    bottom = tl.min(low, axis=0)
    top = tl.max(high, axis=0)
    spread = top - bottom
    varied = spread > tl.maximum(tl.abs(bottom), tl.abs(top)) * EQUAL_WITHIN
    some = spread > 0
    mass = tl.sum(count, axis=0) * tl.max(heaviest, axis=0)
    # Without members the range is (inf, -inf): harmless numbers in its place.
    bottom = tl.where(some, bottom, 0.0)
    spread = tl.where(some, spread, 1.0)
    grid0, grid1 = anchor_for(mass), anchor_for(mass * spread)
    grid_squares = anchor_for(mass * tl.max(heaviest, axis=0))
    total = bottom * 0.0
    first = bottom * 0.0
    squares = bottom * 0.0
    for i in range(begin, end, BLOCK):
        r, w, member = load_members(rewards, weight, group_id, group, i + lane, end, MATCH, WEIGHTED)
        total += snapped_sum(w, grid0)
        first += snapped_sum(w * tl.where(member, r - bottom, 0.0), grid1)
        if UNBIASED:
            squares += snapped_sum(w * w, grid_squares)
    shift = first / tl.where(total > 0, total, 1.0)
    grid2 = anchor_for(mass * spread * spread)
    second = bottom * 0.0
    for i in range(begin, end, BLOCK):
        r, w, member = load_members(rewards, weight, group_id, group, i + lane, end, MATCH, WEIGHTED)
        d = tl.where(member, (r - bottom) - shift, 0.0)
        second += snapped_sum(w * (d * d), grid2)
    spare = total
    if UNBIASED:
        spare = total - squares / tl.where(total > 0, total, 1.0)
    deviation = tl.sqrt(second / tl.where(spare > 0, spare, 1.0))
    if UNBIASED:  # beside a weight that outweighs its group to the last bit the others are no second member
        deviation = tl.where(spare > 0, deviation, float("inf"))
    return bottom, varied, total, shift, tl.where(some, deviation, 0.0)


@triton.jit
def advantage(r, w, low, varied, total, shift, deviation, eps, ESTIMATOR: tl.constexpr):
    """Advantage (float64) of reward r with weight w; `deviation` is the batch's for the batch estimator."""
    centred = (r - low) - shift
    if ESTIMATOR == RLOO:
        others = total - w
        a = tl.where(others > 0, centred * (total / tl.where(others > 0, others, 1.0)), 0.0)
    elif ESTIMATOR == DR_GRPO:
        a = centred
    else:
        tl.static_assert((ESTIMATOR == GRPO) | (ESTIMATOR == BATCH), "ESTIMATOR has no formula")
        a = centred / (deviation + eps)
    return tl.where(varied, tl.where(w > 0, a, 0.0), 0.0)


@triton.jit(do_not_specialize=["n"])
def batch_deviation_kernel(
    rewards, weight, out, n, WEIGHTED: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr
):
    """Standard deviation of all n rewards into out[0] (float64); one program."""
    _, _, _, _, deviation = moments(rewards, weight, rewards, 0, 0, n, False, WEIGHTED, BLOCK, UNBIASED)
    tl.store(out, deviation)


@triton.jit
def run_end(ids, group, begin, end, BLOCK: tl.constexpr):
    """The first of the rows [begin, end) that is not of `group`; end where all are."""
    lane = tl.arange(0, BLOCK)
    at = begin
    whole = at < end
    while whole:
        inside = at + lane < end
        own = inside & (tl.load(ids + at + lane, mask=inside, other=0) == group)
        members = tl.min(tl.where(own, BLOCK, lane), axis=0)
        at += members
        whole = (members == BLOCK) & (at < end)
    return at


@triton.jit(do_not_specialize=["n"])
def group_advantage_kernel(
    rewards,  # float (N,), rows sorted by group
    weight,  # float (N,), likewise
    ids,  # int (N,), the rows' groups, sorted
    order,  # int64 (N,), where the row came from
    deviation,  # float64 (1,), the batch's, read by the batch estimator
    out,  # float (N,), in the original order
    n,
    eps,
    ESTIMATOR: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UNBIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program does the groups that begin among its ROWS rows, one after the other."""
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * ROWS
    stop = tl.minimum(first + ROWS, n)
    if first > 0:  # a group that began before is another program's
        first = run_end(ids, tl.load(ids + first - 1), first, stop, BLOCK)
    while first < stop:
        last = run_end(ids, tl.load(ids + first), first, n, BLOCK)
        low, varied, total, shift, spread = moments(
            rewards, weight, ids, 0, first, last, False, WEIGHTED, BLOCK, UNBIASED
        )
        if ESTIMATOR == BATCH:
            spread = tl.load(deviation)
        for i in range(first, last, BLOCK):
            r, w, _ = load_members(rewards, weight, ids, 0, i + lane, last, False, WEIGHTED)
            a = advantage(r, w, low, varied, total, shift, spread, eps, ESTIMATOR)
            inside = i + lane < last
            to = tl.load(order + i + lane, mask=inside, other=0)
            tl.store(out + to, a, mask=inside)
        first = last
