"""Rows of logits on the device: statistics, and the gradient of log-prob and entropy over the vocabulary.

One program a row, run-time sizes, no atomics. In base 2 with k = log2(e) / temperature and t_v = (z_v - max
z) k: S = sum 2^t, B = sum 2^t t. -inf logits have probability 0, also when a whole leading block is -inf.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-126.0)  # 2^t below the normal range counts as 0


@triton.jit
def row_statistics(row_ptr, vocabulary, k, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(max z, S, B) of one row, float32 scalars. Each lane takes VEC neighbours at a time, which share one rescaling of
    its running sums, and keeps a maximum of its own until the end. The row is asked to stay in the L2 cache."""
    LANES: tl.constexpr = BLOCK // VEC
    at_lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    m = tl.full((LANES,), -float("inf"), tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    b = tl.zeros((LANES,), tl.float32)
    for at in range(0, vocabulary, BLOCK):
        inside = at + at_lane < vocabulary
        z = tl.load(row_ptr + at + at_lane, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        z = z.to(tl.float32)
        top = tl.maximum(m, tl.max(z, axis=1))
        held = tl.where(top == -float("inf"), 0.0, top)
        down = tl.where(m == -float("inf"), 0.0, (m - held) * k)
        t = (z - held[:, None]) * k
        e = tl.exp2(t)
        scale = tl.exp2(down)
        b = scale * (b + down * s) + tl.sum(e * tl.where(t < FLOOR, FLOOR, t), axis=1)
        s = scale * s + tl.sum(e, axis=1)
        m = top
    maximum = tl.max(m, axis=0)
    down = tl.where(m == -float("inf"), 0.0, (m - maximum) * k)
    scale = tl.exp2(down)
    return maximum, tl.sum(scale * s, axis=0), tl.sum(scale * (b + down * s), axis=0)


@triton.jit
def write_gradient(
    row_ptr,
    out_ptr,
    vocabulary,
    target,
    k,
    maximum,
    total,
    logp,
    entropy,
    c,
    e,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c ([v = target] - p) - e p (ln p + entropy) into out (which may be the row); c and e hold 1 / temperature, and e
    is 0 without ENTROPY."""
    lane = tl.arange(0, BLOCK)
    inverse_sum = 1.0 / total
    # 1 - p without cancellation where p is near 1.
    series = -logp * (1.0 + logp * (0.5 + logp * (1.0 / 6.0 + logp * (1.0 / 24.0 + logp / 120.0))))
    p_target = tl.exp(logp)
    own = c * tl.where(logp > -0.125, series, 1.0 - p_target)
    log_sum = tl.log(total)
    if ENTROPY:
        own -= e * p_target * (logp + entropy)
    for at in range(0, vocabulary, BLOCK):
        inside = at + lane < vocabulary
        z = tl.load(row_ptr + at + lane, mask=inside, other=-float("inf"), eviction_policy="evict_first")
        t = (z.to(tl.float32) - maximum) * k
        p = tl.exp2(t) * inverse_sum
        if ENTROPY:
            g = -p * (c + e * (tl.where(t < FLOOR, FLOOR, t) * LN2 - log_sum + entropy))
        else:
            g = -p * c
        g = tl.where(at + lane == target, own, g)
        tl.store(out_ptr + at + lane, g, mask=inside, eviction_policy="evict_first")


@triton.jit
def write_zeros(out_ptr, vocabulary, BLOCK: tl.constexpr):
    """A row of zeros."""
    lane = tl.arange(0, BLOCK)
    for at in range(0, vocabulary, BLOCK):
        tl.store(out_ptr + at + lane, tl.zeros((BLOCK,), tl.float32), mask=at + lane < vocabulary)


@triton.jit
def scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    """x *= factor[0] over n contiguous entries; a factor of 1 costs one load and no sweep."""
    f = tl.load(factor).to(tl.float32)
    if f != 1.0:
        lane = tl.arange(0, BLOCK)
        for at in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            inside = at + lane < n
            value = tl.load(x + at + lane, mask=inside).to(tl.float32)
            tl.store(x + at + lane, value * f, mask=inside)


@triton.jit
def partials_kernel(
    logits,  # (T, V)
    target_ids,  # int64 (T,); outside [0, V): not in this shard
    active,  # uint8 (T,), read when HAS_ACTIVE
    maximum,  # float32 (T,), and the next three
    total,
    weighted,
    target,
    stride,
    vocabulary,
    k,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Statistics of each row: max z, sum exp(u), sum exp(u) u, target's z; (0, 1, 0, 0) for rows that are not
    active."""
    row = tl.program_id(0).to(tl.int64)
    row_active = True
    if HAS_ACTIVE:
        row_active = tl.load(active + row) != 0
    if row_active:
        row_ptr = logits + row * stride
        m, s, b = row_statistics(row_ptr, vocabulary, k, BLOCK, VEC)
        wanted = tl.load(target_ids + row)
        here = (wanted >= 0) & (wanted < vocabulary)
        z = tl.load(row_ptr + wanted, mask=here, other=-float("inf")).to(tl.float32)
        tl.store(maximum + row, m)
        tl.store(total + row, s)
        tl.store(weighted + row, b * LN2)
        tl.store(target + row, z)
    else:
        tl.store(maximum + row, 0.0)
        tl.store(total + row, 1.0)
        tl.store(weighted + row, 0.0)
        tl.store(target + row, 0.0)


@triton.jit
def gradient_kernel(
    logits,  # (T, V)
    grad,  # (T, V), may be the logits
    target_ids,  # int64 (T,)
    maximum,  # float32 (T,), of the whole vocabulary, as are the next two
    total,
    entropy,
    c,  # float32 (T,): d loss / d logp
    e,  # float32 (T,): d loss / d entropy
    stride,
    grad_stride,
    vocabulary,
    k,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Gradient of sum c logp + e entropy; rows with c = e = 0 are not read."""
    row = tl.program_id(0).to(tl.int64)
    out_ptr = grad + row * grad_stride
    cc = tl.load(c + row)
    ee = tl.load(e + row)
    m = tl.load(maximum + row)
    s = tl.load(total + row)
    sound = (tl.abs(m) < float("inf")) & (s > 0.0) & (s < float("inf"))
    if sound & ((cc != 0.0) | (ee != 0.0)):
        row_ptr = logits + row * stride
        wanted = tl.load(target_ids + row)
        here = (wanted >= 0) & (wanted < vocabulary)
        z = tl.load(row_ptr + wanted, mask=here, other=0.0).to(tl.float32)
        logp = tl.where(here, (z - m) * inverse_temperature - tl.log(s), 0.0)
        tl.debug_barrier()  # every lane has the target's logit before a lane may overwrite it
        write_gradient(
            row_ptr,
            out_ptr,
            vocabulary,
            wanted,
            k,
            m,
            s,
            logp,
            tl.load(entropy + row),
            cc * inverse_temperature,
            ee * inverse_temperature,
            True,
            BLOCK,
        )
    else:
        write_zeros(out_ptr, vocabulary, BLOCK)
