"""The GRPO family's loss from logits in one launch: group statistics, token coefficient, logits -> d loss / d
logits.

One program a row: it reduces its own group (cached loads of N rewards), sweeps the row once for its
statistics, forms the token's coefficient, and sweeps it again to write the gradient, which may overwrite the
logits. A masked row is not read. Formulas: token_loss.py and group_advantage.py among the ops.
"""

import triton
import triton.language as tl

from .group_advantage import BATCH, advantage, moments
from .logprob import LN2, row_statistics, write_gradient, write_zeros

CLIPPED = tl.constexpr(0)  # fused_id of the losses (mgrpo/losses/builtin.py)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
TOKEN_TIS = tl.constexpr(1)  # corrections; 0: none, or known and in policy_weight
MIS = tl.constexpr(2)


@triton.jit
def policy_slope(log_ratio, a, eps_low, eps_high, delta, bound, tau_pos, tau_neg, LOSS: tl.constexpr):
    """d policy term / d logp. Through the branch that wins; on a tie half through each, as torch.minimum
    does. Above the bound on log-ratios the ratio is constant."""
    ratio = tl.exp(tl.minimum(log_ratio, bound))
    if LOSS == CISPO:
        slope = -tl.minimum(ratio, eps_high) * a
    elif LOSS == SAPO:
        tau = tl.where(a > 0, tau_pos, tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        slope = -a * 4.0 * gate * (1.0 - gate) * ratio
    else:
        tl.static_assert(LOSS == CLIPPED, "LOSS has no formula")
        low = 1.0 - eps_low
        high = 1.0 + eps_high
        free = tl.minimum(ratio, delta) * a
        clipped = tl.minimum(tl.maximum(ratio, low), high) * a
        slope_free = tl.where(ratio <= delta, 1.0, 0.0)
        slope_clipped = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
        tie = 0.5 * (slope_free + slope_clipped)
        slope = tl.where(free < clipped, slope_free, tl.where(clipped < free, slope_clipped, tie))
        slope = -slope * a * ratio
    if LOSS != CISPO:  # whose ratio is a detached factor
        slope = tl.where(log_ratio <= bound, slope, 0.0)
    return slope


@triton.jit
def kl_slope(diff, bound, KL: tl.constexpr):
    """d KL / d logp for diff = ref - logp and estimator k1, k2 or k3."""
    if KL == 1:
        slope = diff * 0.0 + 1.0
    elif KL == 2:
        slope = -diff
    else:
        tl.static_assert(KL == 3, "KL has no formula")
        series = -diff * (1.0 + diff * (0.5 + diff * (1.0 / 6.0 + diff / 24.0)))
        slope = tl.where(tl.abs(diff) < 0.03, series, 1.0 - tl.exp(tl.minimum(diff, bound)))
        slope = tl.where(diff <= bound, slope, 0.0)
    return slope


@triton.jit
def correction_factor(log_rho, bound, low, high, CORRECTION: tl.constexpr):
    """Factor on the policy term, from the log of training / sampling probability; NaN, where the sampler has none, is
    0."""
    log_rho = tl.where(log_rho == log_rho, log_rho, 0.0)
    rho = tl.exp(log_rho)
    held = tl.exp(tl.minimum(log_rho, bound))
    if CORRECTION == TOKEN_TIS:
        factor = tl.minimum(held, high)
    else:
        tl.static_assert(CORRECTION == MIS, "CORRECTION has no formula")
        factor = tl.where((rho >= low) & (rho <= high), held, 0.0)
    return factor


@triton.jit(do_not_specialize=["n"])
def grpo_loss_kernel(
    logits,  # (T, V)
    grad,  # (T, V), may be the logits (of a type of its own where it is not); not written without NEED_GRAD
    target_ids,  # int64 (T,)
    seq_id,  # int64 (T,), trajectory of each row
    policy_weight,  # float32 (T,), mask x sequence weight x normaliser x what is known of the correction
    weight,  # float32 (T,), the same without the correction
    advantages,  # float32 (T,): read, or written with GROUPS
    rewards,  # (N,), with GROUPS
    group_id,  # int32 (N,), with GROUPS
    seq_weight,  # (N,), with WEIGHTED
    old,  # float32 (T,), with HAS_OLD; likewise the next two
    ref,
    rollout,
    logp_out,  # float32 (T,)
    entropy_out,  # float32 (T,)
    has_grad_out,  # uint8 (T,), 1 where the gradient is not all 0
    stride,
    grad_stride,
    vocabulary,
    n,
    k,
    inverse_temperature,
    eps_low,
    eps_high,
    delta,
    log_ratio_clip,
    tau_pos,
    tau_neg,
    kl_coef,
    entropy_coef,
    correction_low,
    correction_high,
    advantage_eps,
    LOSS: tl.constexpr,
    KL: tl.constexpr,  # 0: no KL term
    ENTROPY: tl.constexpr,
    CORRECTION: tl.constexpr,
    GROUPS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    HAS_OLD: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_ptr = grad + row * grad_stride
    w = tl.load(weight + row)
    pw = tl.load(policy_weight + row)
    a = w * 0.0
    if GROUPS:
        if w != 0.0:
            own = tl.load(seq_id + row)
            group = tl.load(group_id + own)
            low, varied, total, shift, spread = moments(
                rewards, seq_weight, group_id, group, 0, n, True, WEIGHTED, BLOCK_N
            )
            if ESTIMATOR == BATCH:
                _, _, _, _, spread = moments(
                    rewards, seq_weight, group_id, group, 0, n, False, WEIGHTED, BLOCK_N
                )
            seq_w = 1.0
            if WEIGHTED:
                seq_w = tl.load(seq_weight + own)
            r = tl.load(rewards + own).to(tl.float64)
            a = advantage(
                r, seq_w.to(tl.float64), low, varied, total, shift, spread, advantage_eps, ESTIMATOR
            ).to(tl.float32)
        tl.store(advantages + row, a)
    else:
        a = tl.load(advantages + row)
    active = (pw != 0.0) & (a != 0.0)
    if (KL != 0) | ENTROPY:
        active = active | (w != 0.0)
    logp = w * 0.0
    h = w * 0.0
    c, e = w * 0.0, w * 0.0
    m = w * 0.0
    s = w * 0.0 + 1.0
    wanted = tl.load(target_ids + row)
    row_ptr = logits + row * stride
    if active:
        m, s, b = row_statistics(row_ptr, vocabulary, k, BLOCK, VEC, TILES)
        here = (wanted >= 0) & (wanted < vocabulary)
        z = tl.load(row_ptr + wanted, mask=here, other=float("nan")).to(tl.float32)
        log_sum = tl.log(s)
        logp = (z - m) * inverse_temperature - log_sum
        h = log_sum - b * LN2 / s
        if (tl.abs(logp) < float("inf")) & (tl.abs(h) < float("inf")):
            base = logp
            if HAS_OLD:
                base = tl.load(old + row)
            c = pw * policy_slope(
                logp - base, a, eps_low, eps_high, delta, log_ratio_clip, tau_pos, tau_neg, LOSS
            )
            if CORRECTION != 0:
                log_rho = base - tl.load(rollout + row)
                c *= correction_factor(log_rho, log_ratio_clip, correction_low, correction_high, CORRECTION)
            c = tl.where((pw != 0.0) & (a != 0.0), c, 0.0)
            if KL != 0:
                c += w * kl_coef * kl_slope(tl.load(ref + row) - logp, log_ratio_clip, KL)
            if ENTROPY:
                e = -entropy_coef * w
        else:
            logp = w * float("nan")
            h = logp
    tl.store(logp_out + row, logp)
    tl.store(entropy_out + row, h)
    has_grad = (c != 0.0) | (e != 0.0)
    tl.store(has_grad_out + row, has_grad.to(tl.uint8))
    if NEED_GRAD:
        if has_grad:
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
                h,
                c * inverse_temperature,
                e * inverse_temperature,
                ENTROPY,
                BLOCK,
                TILES,
            )
        else:
            write_zeros(out_ptr, vocabulary, BLOCK)
