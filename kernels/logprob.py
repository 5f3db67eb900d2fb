"""Rows of logits on the device: statistics, and the gradient of log-prob and entropy over the vocabulary.

One program a row, run-time sizes, no atomics. In base 2 with k = log2(e) / temperature and t_v = z_v k - (max z) k: S =
sum 2^t, B = sum 2^t t. -inf logits have probability 0, also when a whole leading block is -inf.

What a logit costs is counted in the machine code (bench/bench_compile.py), so the sweeps are written for it: whole
tiles are loaded without a mask and the rest of the row with one; the exponent is one fused multiply-add z k - R against
an integer R = floor(max z k), and 2^(max z k - R), what R leaves, is taken out of the sums once a row; the target's own
element is written after the sweep. An integer, because a rounded product would be fused into what it is subtracted from
in one place and not in another. A row whose largest logit is below LOWEST, or not finite times k, counts as one that is
not finite.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-160.0)  # 2^FLOOR is 0 in float32; keeps 0 x -inf out of the sums
LOWEST = tl.constexpr(-1e30)  # where a lane's running maximum starts


@triton.jit
def _add_tile(z, m, r, s, b, k):
    """(m, r, s, b) of each lane with the logits z (tiles, lanes, neighbours) added; all of a lane's logits share one
    rescaling of its sums."""
    m = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0))
    reference = tl.floor(m * k)
    t = z * k - reference[None, :, None]
    t = tl.where(t < FLOOR, FLOOR, t)  # NaN stays NaN
    e = tl.exp2(t)
    down = r - reference
    scale = tl.exp2(down)
    b = scale * (b + down * s) + tl.sum(tl.sum(e * t, axis=2), axis=0)
    s = scale * s + tl.sum(tl.sum(e, axis=2), axis=0)
    return m, reference, s, b


@triton.jit
def row_statistics(row_ptr, vocabulary, k, BLOCK: tl.constexpr, VEC: tl.constexpr, TILES: tl.constexpr):
    """(max z, S, B) of one row, float32 scalars. Each lane takes VEC neighbours from each of TILES blocks at a time and
    keeps a maximum of its own until the end. The row is asked to stay in the L2 cache."""
    LANES: tl.constexpr = BLOCK // VEC
    at_lane = tl.arange(0, LANES)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    at_tile = tl.arange(0, TILES)[:, None, None] * BLOCK + at_lane
    m = tl.full((LANES,), LOWEST, tl.float32)
    r = tl.floor(m * k)
    s = tl.zeros((LANES,), tl.float32)
    b = tl.zeros((LANES,), tl.float32)
    whole = vocabulary // (BLOCK * TILES) * (BLOCK * TILES)
    for at in range(0, whole, BLOCK * TILES):
        z = tl.load(row_ptr + at + at_tile, eviction_policy="evict_last").to(tl.float32)
        m, r, s, b = _add_tile(z, m, r, s, b, k)
    for at in range(whole, vocabulary, BLOCK):
        inside = at + at_lane < vocabulary
        z = tl.load(row_ptr + at + at_lane, mask=inside, other=-float("inf"), eviction_policy="evict_last")
        m, r, s, b = _add_tile(z.to(tl.float32), m, r, s, b, k)
    maximum = tl.max(m, axis=0)
    reference = tl.floor(maximum * k)
    down = r - reference
    scale = tl.exp2(down)
    b = tl.sum(scale * (b + down * s), axis=0)
    s = tl.sum(scale * s, axis=0)
    above = maximum * k - reference
    scale = tl.exp2(-above)
    return tl.where(s == 0.0, -float("inf"), maximum), scale * s, scale * (b - above * s)


@triton.jit
def _gradient(z, k, reference, a, b, ENTROPY: tl.constexpr):
    """2^t (a + b t) for t = z k - R; 2^t a without ENTROPY."""
    t = z.to(tl.float32) * k - reference
    if ENTROPY:
        t = tl.where(t < FLOOR, FLOOR, t)
        g = tl.exp2(t) * (a + b * t)
    else:
        g = tl.exp2(t) * a
    return g


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
    TILES: tl.constexpr,
):
    """c ([v = target] - p) - e p (ln p + entropy) into out (which may be the row, if it has its type); c and e hold 1 /
    temperature, and e is 0 without ENTROPY."""
    reference = tl.floor(maximum * k)
    above = maximum * k - reference
    share = tl.exp2(-above) / total  # p = 2^(z k - R) share
    a = -c * share
    b = a * 0.0
    if ENTROPY:
        a -= e * share * (entropy - tl.log(total) - above * LN2)
        b -= e * share * LN2
    lane = tl.arange(0, BLOCK)
    wide = tl.arange(0, BLOCK * TILES)
    whole = vocabulary // (BLOCK * TILES) * (BLOCK * TILES)
    for at in range(0, whole, BLOCK * TILES):
        z = tl.load(row_ptr + at + wide, eviction_policy="evict_first")
        g = _gradient(z, k, reference, a, b, ENTROPY)
        tl.store(out_ptr + at + wide, g, eviction_policy="evict_first")
    for at in range(whole, vocabulary, BLOCK):
        inside = at + lane < vocabulary
        z = tl.load(row_ptr + at + lane, mask=inside, other=-float("inf"), eviction_policy="evict_first")
        g = _gradient(z, k, reference, a, b, ENTROPY)
        tl.store(out_ptr + at + lane, g, mask=inside, eviction_policy="evict_first")
    # 1 - p without cancellation where p is near 1.
    series = -logp * (1.0 + logp * (0.5 + logp * (1.0 / 6.0 + logp * (1.0 / 24.0 + logp / 120.0))))
    p_target = tl.exp(logp)
    own = c * tl.where(logp > -0.125, series, 1.0 - p_target)
    if ENTROPY:
        own -= e * p_target * (logp + entropy)
    tl.debug_barrier()  # the sweep has written the target's element
    tl.store(out_ptr + target, own, mask=(target >= 0) & (target < vocabulary))


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
    TILES: tl.constexpr,
):
    """Statistics of each row: max z, sum exp(u), sum exp(u) u, target's z; (0, 1, 0, 0) for rows that are not
    active."""
    row = tl.program_id(0).to(tl.int64)
    row_active = True
    if HAS_ACTIVE:
        row_active = tl.load(active + row) != 0
    if row_active:
        row_ptr = logits + row * stride
        m, s, b = row_statistics(row_ptr, vocabulary, k, BLOCK, VEC, TILES)
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
    grad,  # (T, V), may be the logits; of a type of its own where it is not
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
    TILES: tl.constexpr,
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
            TILES,
        )
    else:
        write_zeros(out_ptr, vocabulary, BLOCK)
