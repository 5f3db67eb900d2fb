"""The loss and its metrics from T log-probs, for the losses whose term the kernels know, in one launch.

What the ops' token_loss.py does in a hundred small ones. One program walks over the vectors a block at a time and keeps
its sums in each lane, so that the order of additions depends on T alone and no second launch is needed: for 16,384
tokens they are a megabyte, beside gigabytes of logits.
"""

import triton
import triton.language as tl

from .grpo_loss import CISPO, CLIPPED, SAPO, correction_factor

TINY = tl.constexpr(1.1754943508222875e-38)
"""Smallest normal float32."""
NEGATIVE = tl.constexpr(-3.0e38)
"""Below every log-weight, and finite: a lane that has none yet rescales its sums by exp(NEGATIVE - x) = 0."""


@triton.jit
def term(ratio, logp, a, lower, upper, delta, tau_pos, tau_neg, LOSS: tl.constexpr):
    """The policy term (mgrpo/losses/builtin.py)."""
    if LOSS == CISPO:
        out = -tl.minimum(ratio, upper) * a * logp
    elif LOSS == SAPO:
        tau = tl.where(a > 0, tau_pos, tau_neg)
        out = -a * (1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))) * 4.0 / tau
    else:
        tl.static_assert(LOSS == CLIPPED, "LOSS has no formula")
        clipped = tl.minimum(tl.maximum(ratio, lower), upper)
        out = -tl.minimum(tl.minimum(ratio, delta) * a, clipped * a)
    return out


@triton.jit
def k3(diff, bound):
    """exp(d) - d - 1 of d = min(diff, bound); its series below 1, where the difference would cancel."""
    d = tl.minimum(diff, bound)
    series = 1.0 + d * (1.0 / 11.0)
    series = 1.0 + d * (1.0 / 10.0) * series
    series = 1.0 + d * (1.0 / 9.0) * series
    series = 1.0 + d * (1.0 / 8.0) * series
    series = 1.0 + d * (1.0 / 7.0) * series
    series = 1.0 + d * (1.0 / 6.0) * series
    series = 1.0 + d * (1.0 / 5.0) * series
    series = 1.0 + d * (1.0 / 4.0) * series
    series = 1.0 + d * (1.0 / 3.0) * series
    return tl.where(tl.abs(d) < 1.0, 0.5 * d * d * series, tl.exp(d) - 1.0 - d)


@triton.jit
def kl_term(diff, bound, KL: tl.constexpr):
    """Estimate of KL(policy || reference) for diff = ref - logp and estimator k1, k2 or k3."""
    if KL == 1:
        out = -diff
    elif KL == 2:
        out = 0.5 * diff * diff
    else:
        tl.static_assert(KL == 3, "KL has no formula")
        out = k3(diff, bound)
    return out


@triton.jit(do_not_specialize=["n"])
def token_loss_kernel(
    logp,  # float32 (T,), as are entropy, weights, advantages and the log-probs
    entropy,
    mask,  # uint8 (T,)
    policy_weight,
    weight,
    advantages,
    old,  # with HAS_OLD; likewise the next two
    ref,
    rollout,  # NaN where the sampler has none
    value_out,  # float32 (1,)
    metrics_out,  # float32 (14,), in the order of METRICS
    n,  # T
    lower,  # bounds at which the term holds the ratio
    upper,
    delta,
    log_ratio_clip,
    tau_pos,
    tau_neg,
    kl_coef,
    entropy_coef,
    correction_low,
    correction_high,
    LOSS: tl.constexpr,
    KL: tl.constexpr,  # estimator
    KL_ACTS: tl.constexpr,  # it is a term of the loss
    ENTROPY: tl.constexpr,
    CORRECTION: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    none = lanes * 0
    zero = none.to(tl.float32)
    inf = float("inf")
    policy, kl_loss, entropy_loss, kl_sum, entropy_sum = zero, zero, zero, zero, zero
    ratio_sum, ratio_min, ratio_max = zero, zero + inf, zero - inf
    acting, rows, low, high, unfit, missing = none, none, none, none, none, none
    known_rows, mismatch, gap = none, zero, zero
    largest, total, squares = zero + NEGATIVE, zero, zero
    for at in range(0, n, BLOCK):
        i = at + lanes
        inside = i < n
        pw = tl.load(policy_weight + i, mask=inside, other=0.0)
        w = tl.load(weight + i, mask=inside, other=0.0)
        a = tl.load(advantages + i, mask=inside, other=0.0)
        lp = tl.load(logp + i, mask=inside, other=0.0)
        h = tl.load(entropy + i, mask=inside, other=0.0)
        active = (pw != 0.0) & (a != 0.0)
        if KL_ACTS | ENTROPY:
            active = active | (w != 0.0)
        finite = (tl.abs(lp) < inf) & (tl.abs(h) < inf)
        counted = active & finite
        acting += active.to(tl.int32)
        rows += counted.to(tl.int32)
        unfit += (active & (finite == 0)).to(tl.int32)
        lp = tl.where(counted, lp, 0.0)
        entropy_sum += tl.where(counted, h, 0.0)
        base = lp
        if HAS_OLD:
            base = tl.load(old + i, mask=inside, other=0.0)
        log_ratio = tl.where(counted, lp - base, 0.0)
        ratio = tl.exp(tl.minimum(log_ratio, log_ratio_clip))
        known = counted
        sampled = base
        if HAS_ROLLOUT:
            sampled = tl.load(rollout + i, mask=inside, other=0.0)
            known = counted & (sampled == sampled)
            masked = tl.load(mask + i, mask=inside, other=0)
            missing += ((masked != 0) & (sampled != sampled)).to(tl.int32)
        loss = pw * term(ratio, lp, a, lower, upper, delta, tau_pos, tau_neg, LOSS)
        if CORRECTION != 0:
            log_rho = tl.where(known, base - sampled, 0.0)
            loss *= correction_factor(log_rho, log_ratio_clip, correction_low, correction_high, CORRECTION)
        policy += tl.where(counted, loss, 0.0)
        if HAS_REF:
            kl = kl_term(tl.load(ref + i, mask=inside, other=0.0) - lp, log_ratio_clip, KL)
            kl = tl.where(counted, kl, 0.0)
            kl_sum += kl
            if KL_ACTS:
                kl_loss += tl.where(counted, w * kl, 0.0)
        if ENTROPY:
            entropy_loss += tl.where(counted, w * h, 0.0)
        ratio_sum += tl.where(counted, ratio, 0.0)
        ratio_min = tl.minimum(ratio_min, tl.where(counted, ratio, inf))
        ratio_max = tl.maximum(ratio_max, tl.where(counted, ratio, -inf))
        low += (counted & (a < 0.0) & (ratio < lower)).to(tl.int32)
        high += (counted & (a > 0.0) & (ratio > upper)).to(tl.int32)
        known_rows += known.to(tl.int32)
        log_weight = log_ratio
        if HAS_ROLLOUT:
            log_weight = tl.where(known, base - sampled, 0.0)
            mismatch += tl.where(known, k3(log_weight, log_ratio_clip), 0.0)
        gap = tl.maximum(gap, tl.where(known, tl.abs(lp - sampled), 0.0))
        above = tl.maximum(largest, tl.where(known, log_weight, NEGATIVE))
        shrink = tl.exp(largest - above)
        share = tl.where(known, tl.exp(log_weight - above), 0.0)
        total = total * shrink + share
        squares = squares * shrink * shrink + share * share
        largest = above
    count = tl.sum(rows, 0)
    some = count > 0
    over = tl.maximum(count, 1).to(tl.float32)
    loss = tl.sum(policy, 0)
    value = loss
    if KL_ACTS:
        value += kl_coef * tl.sum(kl_loss, 0)
    if ENTROPY:
        value -= entropy_coef * tl.sum(entropy_loss, 0)
    tl.store(value_out, value)
    tl.store(metrics_out, loss)
    tl.store(metrics_out + 1, tl.sum(kl_sum, 0) / over)
    tl.store(metrics_out + 2, tl.sum(entropy_sum, 0) / over)
    tl.store(metrics_out + 3, tl.sum(low, 0).to(tl.float32) / over)
    tl.store(metrics_out + 4, tl.sum(high, 0).to(tl.float32) / over)
    tl.store(metrics_out + 5, tl.where(some, tl.min(ratio_min, 0), 1.0))
    tl.store(metrics_out + 6, tl.where(some, tl.sum(ratio_sum, 0) / over, 1.0))
    tl.store(metrics_out + 7, tl.where(some, tl.max(ratio_max, 0), 1.0))
    known_count = tl.sum(known_rows, 0)
    tl.store(metrics_out + 8, tl.sum(mismatch, 0) / tl.maximum(known_count, 1).to(tl.float32))
    # The effective sample size does not depend on the scale of the weights: the largest is made 1.
    scale = tl.exp(largest - tl.max(largest, 0))
    sum_of_weights = tl.sum(total * scale, 0)
    sum_of_squares = tl.sum(squares * scale * scale, 0) * known_count.to(tl.float32)
    size = sum_of_weights * sum_of_weights / tl.maximum(sum_of_squares, TINY)
    tl.store(metrics_out + 9, tl.where(known_count > 0, size, 1.0))
    tl.store(metrics_out + 10, tl.max(gap, 0))
    tl.store(metrics_out + 11, tl.sum(acting, 0).to(tl.float32) / tl.maximum(n, 1).to(tl.float32))
    tl.store(metrics_out + 12, tl.sum(unfit, 0).to(tl.float32))
    tl.store(metrics_out + 13, tl.sum(missing, 0).to(tl.float32))
