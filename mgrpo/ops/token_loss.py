"""From log-probs to the loss: everything that happens once a row of logits has become one log-prob and one
entropy.

For token t of trajectory j, with the term of the loss (mgrpo/losses) in its log-prob, its ratio r_t = exp(logp_t -
old_t) and its advantage, and with a detached correction c_t:

    loss = 1/D sum_j w_j n_j sum_t mask_t [ c_t term_t + kl_coef KL_t - entropy_coef entropy_t ]

with n_j = 1/|o_j| for the losses with a sequence mean and 1 for the others, and D the denominator
(`loss_denominator`). mask, w, n and 1/D fold into one weight a token, so every loss is one sum. Source: M-GRPO
(arXiv 2511.13288); settings mean what they mean in TRL 1.16.

Deviations: 1. counts are weighted by the alignment weight w_j, so a multiplicity equals that many copies. 2.
D may be given, so that gradient accumulation does not depend on how micro-batches are cut. 3. A row whose
log-prob is not finite contributes nothing and is counted. 4. Log-ratios are bounded above by
`log_ratio_clip` before they are exponentiated (as torch.clamp does it: no gradient beyond). Where a clip, a cap
or a saturated gate holds the token, its gradient is 0 with and without the bound; elsewhere the bound keeps the
loss finite. 5. A row for which the sampler has no log-prob (NaN, or infinite) is one whose log-prob is the
trainer's: no correction at this token, and no part in what compares the two engines; it is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mgrpo.config.loss import SEQUENCE_CORRECTIONS, GrpoLossConfig
from mgrpo.losses.base import PolicyLoss, TermInputs
from mgrpo.losses.registry import find_loss

METRICS = (
    "policy_loss",
    "kl",
    "entropy",
    "clip_frac_low",
    "clip_frac_high",
    "ratio_min",
    "ratio_mean",
    "ratio_max",
    "mismatch_kl",
    "ess",
    "logprob_diff_max",
    "active_row_frac",
    "nonfinite_rows",
    "rollout_missing_rows",
)
"""Keys of the metrics every loss call returns, each a 0-d tensor on the logits' device."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Rewards of the N trajectories, whose groups a kernel reduces itself; weight None: all 1."""

    rewards: Tensor  # (N,)
    group_id: Tensor  # int32 (N,)
    weight: Tensor | None  # (N,)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the loss knows about T rows apart from their logits; tensors of shape (T,) on one device.

    weight is mask x sequence weight x normaliser x the token's own weight; policy_weight is the same with what is known
    of the correction. mask_value: what a token counts as, where the mask is no bool (`share`).
    """

    target_ids: Tensor  # int64
    seq_id: Tensor  # int64, which trajectory
    mask: Tensor  # bool
    weight: Tensor
    policy_weight: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None  # NaN where the sampler has none
    mask_value: Tensor | None
    num_sequences: int
    groups: Groups | None = None

    def active(self, loss: PolicyLoss) -> Tensor:
        """bool (T,): rows that can change the loss or its gradient; the others need no pass over the vocabulary.

        A built-in term with advantage 0 is 0 whatever the ratio, and so is its gradient. With a sequence-level
        ratio or correction the whole trajectory shares one factor, which advantage 0 makes as idle as a
        masked one.
        """
        config = loss.config
        acts = self.policy_weight != 0
        if loss.zero_without_advantage:
            acts = acts & (self.advantages != 0)
        if loss.has_sequence_ratio:  # every token of an active sequence moves the sequence's ratio
            acts = acts | (self.mask & self._in_sequence(acts))
        if _sequence_correction(config) and self.old_logprobs is None:
            acts = acts | (self.mask & self._in_sequence(acts))
        if config.kl_coef or config.entropy_coef:
            acts = acts | (self.weight != 0)
        return acts

    def share(self, dtype: torch.dtype) -> Tensor:
        """(T,) what each token counts as in the length of its trajectory: 0 where the mask is not set."""
        if self.mask_value is None:
            return self.mask.to(dtype)
        return torch.where(self.mask, self.mask_value, 0).to(dtype)

    def _in_sequence(self, rows: Tensor) -> Tensor:
        hit = torch.zeros(self.num_sequences, dtype=torch.int32, device=rows.device)
        return (hit.index_add(0, self.seq_id, rows.to(torch.int32)) > 0)[self.seq_id]

    def with_advantages(self, advantages: Tensor) -> Tokens:
        """The same with the advantages (T,) a kernel computed from `groups`."""
        return replace(self, advantages=advantages, groups=None)

    def rows(self, index: Tensor | slice) -> Tokens:
        """The same knowledge about the rows `index` (int64) alone, in that order; of a slice without copies."""
        given = {name: x for name in VECTORS if (x := getattr(self, name)) is not None}
        taken = {id(x): x[index] for x in given.values()}  # policy_weight may be weight
        return replace(self, **{name: taken[id(x)] for name, x in given.items()})


VECTORS = tuple(field.name for field in fields(Tokens))[:-2]
"""The fields of Tokens that are (T,), in their order."""


def loss_denominator(
    config: GrpoLossConfig,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None,
    seq_weight: Tensor | None = None,
) -> Tensor:
    """The number that divides the weighted sum of a batch, the loss's `denominator`: 0-d float64, additive over
    micro-batches and ranks.

    grpo, sapo, gspo: sum of seq_weight; bnpo, dapo, cispo: sum of seq_weight x active tokens; dr_grpo: sum of
    seq_weight x max_completion_length. For gradient accumulation add it up over the whole minibatch (every trajectory
    that has a weight, also those dropped for having advantage 0) and pass the sum as `denominator` to each micro-batch:
    the summed gradient is then that of the whole minibatch, however it is cut between trajectories.

    Packed: cu_seqlens int32 or int64 (N+1,), loss_mask (T,) or None (all ones). Padded: loss_mask (N, S) alone.
    seq_weight (N,) or None (all ones). TypeError where the trajectories are given in neither way.
    """
    if cu_seqlens is None and (loss_mask is None or loss_mask.dim() != 2):
        raise TypeError("cu_seqlens: missing; only a padded loss_mask (B, S) needs none")
    loss = find_loss(config)
    if seq_weight is None and loss_mask is not None and loss_mask.dtype == torch.bool:  # whole numbers, exact
        n = loss_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        weights = torch.full((), n, dtype=torch.float64, device=loss_mask.device)
        return loss.denominator(weights, loss_mask.sum(dtype=torch.float64))
    if cu_seqlens is None:
        assert loss_mask is not None
        active = _mask_values(loss_mask).sum(1, dtype=torch.float64)
    else:
        active = active_tokens(cu_seqlens, loss_mask)
    w = torch.ones_like(active) if seq_weight is None else seq_weight.double()
    return loss.denominator(w.sum(), (w * active).sum())


def active_tokens(cu_seqlens: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Sum of loss_mask over each trajectory, the number of its tokens: float64 (N,), exact for whole numbers."""
    if loss_mask is None:
        return cu_seqlens.diff().double()
    edges = torch.nn.functional.pad(_mask_values(loss_mask).cumsum(0), (1, 0))
    return edges[cu_seqlens.long()].diff().double()


def _mask_values(loss_mask: Tensor) -> Tensor:
    return loss_mask.double() if loss_mask.is_floating_point() else loss_mask


def segment_sum(x: Tensor, seq_id: Tensor, num_sequences: int) -> Tensor:
    """(T,) -> (N,): sum over each trajectory's rows."""
    return x.new_zeros(num_sequences).index_add(0, seq_id, x)


def _sequence_correction(config: GrpoLossConfig) -> bool:
    return config.correction in SEQUENCE_CORRECTIONS or config.veto is not None


def needs_two_phases(loss: PolicyLoss, has_old_logprobs: bool) -> bool:
    """True where autograd is to differentiate what the kernels do not know, a term or a KL times the ratio, and where
    a row's coefficient depends on other rows' log-probs: sequence ratios, and sequence-level corrections of the current
    policy itself (with old log-probs the correction is known before the logits)."""
    correction = _sequence_correction(loss.config) and not has_old_logprobs
    return not loss.fused or loss.has_sequence_ratio or correction or loss.config.kl_bias_correction


def correction_weight(logp: Tensor, tokens: Tokens, config: GrpoLossConfig) -> Tensor:
    """(T,) factor on the policy term; `logp` (detached here) are the log-probs of the training engine. rho is 1 where
    the sampler has no log-prob."""
    if config.correction == "none" or tokens.rollout_logprobs is None:
        return torch.ones_like(logp)
    low, high = config.correction_bounds
    n = tokens.num_sequences
    known = tokens.mask & tokens.rollout_logprobs.isfinite()
    log_rho = torch.where(known, logp.detach() - tokens.rollout_logprobs.to(logp.dtype), 0.0)
    rho = log_rho.exp()  # where it overflows it is infinite, which every bound below holds
    largest = math.exp(config.log_ratio_clip)
    if config.correction == "token_tis":
        factor = rho.clamp(max=min(high, largest))
    elif config.correction == "mis":
        factor = torch.where((rho >= low) & (rho <= high), rho.clamp(max=largest), 0.0)
    elif config.correction in SEQUENCE_CORRECTIONS:
        share = torch.where(known, tokens.share(logp.dtype), 0.0)
        total = segment_sum(share * log_rho, tokens.seq_id, n)
        if config.correction == "geometric":
            total = total / segment_sum(share, tokens.seq_id, n).clamp(min=1.0)
        ratio = total.exp()
        inside = (ratio >= low) & (ratio <= high)
        factor = torch.where(inside, ratio.clamp(max=largest), 0.0)[tokens.seq_id]
    else:
        raise ValueError(f"correction: {config.correction!r} has no formula")
    if config.veto is not None:
        bad = segment_sum((tokens.mask & (rho < config.veto)).to(logp.dtype), tokens.seq_id, n)
        factor = torch.where(bad[tokens.seq_id] > 0, 0.0, factor)
    return factor


def token_loss(
    logp: Tensor, entropy: Tensor, tokens: Tokens, loss: PolicyLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss 0-d, metrics) from logp and entropy (T,), differentiable in both: the definition every backend is
    held to.

    Rows whose log-prob is not finite, and rows that are not active, contribute exactly 0. The means among the
    metrics are over active rows with finite log-probs; ratios are 1 and the rest 0 where there are none.
    """
    config = loss.config
    active = tokens.active(loss)
    finite = logp.detach().isfinite() & entropy.detach().isfinite()
    counted = active & finite
    logp = torch.where(counted, logp, 0.0)
    entropy = torch.where(counted, entropy, 0.0)
    base = logp.detach() if tokens.old_logprobs is None else tokens.old_logprobs.to(logp.dtype)
    log_ratio = log_ratio_of(logp, base, tokens, loss, counted)
    ratio = log_ratio.clamp(max=config.log_ratio_clip).exp()
    advantages = tokens.advantages.to(logp.dtype)
    policy_weight = tokens.policy_weight.to(logp.dtype)
    if tokens.old_logprobs is None:  # otherwise the correction is in policy_weight already
        seen = replace(tokens, mask=tokens.mask & counted)
        policy_weight = policy_weight * correction_weight(logp, seen, config)
    ref = None if tokens.ref_logprobs is None else tokens.ref_logprobs.to(logp.dtype)
    seen_by_term = TermInputs(
        logp, base, ratio, advantages, ref, entropy, tokens.seq_id, tokens.num_sequences
    )
    # A built-in term sees all rows: it is finite where one does not count, and no index is made on the device.
    terms = loss.term(seen_by_term) if loss.fused else _term_of(loss, seen_by_term, counted)
    policy = torch.where(counted, policy_weight * terms, 0.0).sum()
    value = policy
    weight = torch.where(counted, tokens.weight, 0.0).to(logp.dtype)
    kl = torch.zeros_like(logp)
    if ref is not None:
        estimate = kl_term(logp, ref, config)
        kl = torch.where(counted, estimate * ratio if config.kl_bias_correction else estimate, 0.0)
        if config.kl_coef:
            value = value + config.kl_coef * (weight * kl).sum()
    if config.entropy_coef:
        value = value - config.entropy_coef * (weight * entropy).sum()
    with torch.no_grad():
        metrics = _ratio_metrics(ratio, tokens, loss, counted)
        metrics |= _mismatch_metrics(logp, log_ratio, tokens, config, counted)
        metrics |= {
            "policy_loss": policy.detach(),
            "kl": _mean(kl, counted),
            "entropy": _mean(entropy, counted),
            "active_row_frac": active.to(logp.dtype).mean() if active.numel() else logp.new_zeros(()),
            "nonfinite_rows": (active & ~finite).sum(),
            "rollout_missing_rows": (tokens.mask & ~_sampled(tokens, tokens.mask)).sum(),
        }
    return value, {name: metrics[name].detach() for name in METRICS}


def stack(metrics: dict[str, Tensor]) -> Tensor:
    """METRICS as the vector an op returns."""
    return torch.stack([metrics[name].to(torch.float32) for name in METRICS])


def name_metrics(stacked: Tensor) -> dict[str, Tensor]:
    """METRICS from the vector an op returns."""
    return dict(zip(METRICS, stacked.detach().unbind(), strict=True))


def log_ratio_of(logp: Tensor, base: Tensor, tokens: Tokens, loss: PolicyLoss, counted: Tensor) -> Tensor:
    """(T,) log of the importance ratio, before any bound: the token's, or the mean over its trajectory; rows that are
    not counted have 0."""
    log_ratio = torch.where(counted, logp - base, 0.0)
    if not loss.has_sequence_ratio:
        return log_ratio
    share = tokens.share(logp.dtype)
    total = segment_sum(share * log_ratio, tokens.seq_id, tokens.num_sequences)
    length = segment_sum(share, tokens.seq_id, tokens.num_sequences)
    return (total / length.clamp(min=1.0))[tokens.seq_id]


def clipped_rows(ratio: Tensor, tokens: Tokens, loss: PolicyLoss) -> tuple[Tensor, Tensor]:
    """bool (T,), (T,): the term holds the ratio at its lower bound (advantage < 0), at its upper one (> 0)."""
    lower, upper = loss.ratio_bounds()
    return (tokens.advantages < 0) & (ratio < lower), (tokens.advantages > 0) & (ratio > upper)


def _term_of(loss: PolicyLoss, tokens: TermInputs, counted: Tensor) -> Tensor:
    """(T,) terms of a loss that is not built in, which sees the counted rows alone; 0 in the others. TypeError or
    ValueError naming the loss where it returns something else."""
    at = counted.nonzero().squeeze(1)
    zeros = tokens.logprobs * 0.0  # differentiable, also where no row is counted
    if not at.numel():
        return zeros
    seen = replace(
        tokens,
        logprobs=tokens.logprobs[at],
        old_logprobs=tokens.old_logprobs[at],
        ratio=tokens.ratio[at],
        advantages=tokens.advantages[at],
        ref_logprobs=None if tokens.ref_logprobs is None else tokens.ref_logprobs[at],
        entropy=tokens.entropy[at],
        seq_id=tokens.seq_id[at],
    )
    terms = loss.term(seen)
    name = f"term of {loss.config.type}"
    if not isinstance(terms, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(terms).__name__}")
    if terms.shape != at.shape or terms.dtype != zeros.dtype or terms.device != zeros.device:
        raise ValueError(
            f"{name}: {terms.dtype} {tuple(terms.shape)} on {terms.device}, where {zeros.dtype} "
            f"({at.numel()},) on {zeros.device} is needed, one value a token"
        )
    return zeros.index_put((at,), terms)


def kl_term(logp: Tensor, ref: Tensor, config: GrpoLossConfig) -> Tensor:
    """(T,) estimate of KL(policy || reference) from the sampled token; ValueError for an estimator that has no formula
    here."""
    diff = ref - logp
    if config.kl_estimator == "k1":
        return -diff
    if config.kl_estimator == "k2":
        return 0.5 * diff.square()
    if config.kl_estimator != "k3":
        raise ValueError(f"kl_estimator: {config.kl_estimator!r} has no formula")
    return _k3(diff, config)


def _k3(diff: Tensor, config: GrpoLossConfig) -> Tensor:
    """exp(d) - d - 1, constant above the bound on log-ratios."""
    diff = diff.clamp(max=config.log_ratio_clip)
    return diff.expm1() - diff


def _mean(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows, x, 0.0).sum() / rows.sum().clamp(min=1)


def _extreme(x: Tensor, rows: Tensor, none: float) -> Tensor:
    """Smallest of the rows' x; `none` where there are no rows."""
    return torch.cat([torch.where(rows, x, none), x.new_full((1,), none)]).amin()


def _ratio_metrics(ratio: Tensor, tokens: Tokens, loss: PolicyLoss, counted: Tensor) -> dict[str, Tensor]:
    """The importance ratio over the counted rows: extremes, mean, and shares of tokens held by the clip."""
    low, high = clipped_rows(ratio, tokens, loss)
    any_row = counted.any()
    inf = float("inf")
    return {
        "clip_frac_low": _mean(low.to(ratio.dtype), counted),
        "clip_frac_high": _mean(high.to(ratio.dtype), counted),
        "ratio_min": torch.where(any_row, _extreme(ratio, counted, inf), 1.0),
        "ratio_mean": torch.where(any_row, _mean(ratio, counted), 1.0),
        "ratio_max": torch.where(any_row, -_extreme(-ratio, counted, inf), 1.0),
    }


def _sampled(tokens: Tokens, rows: Tensor) -> Tensor:
    """bool (T,): those of `rows` whose sampler's log-prob is known; all where the call was given none at all."""
    return rows if tokens.rollout_logprobs is None else rows & tokens.rollout_logprobs.isfinite()


def _mismatch_metrics(
    logp: Tensor, log_ratio: Tensor, tokens: Tokens, config: GrpoLossConfig, counted: Tensor
) -> dict[str, Tensor]:
    """The sampler against the trainer over the counted rows that have its log-prob, from log-probs: none of these
    overflows or has a logarithm of 0."""
    counted = _sampled(tokens, counted)
    log_weight, mismatch = log_ratio, torch.zeros_like(logp)
    sampled = tokens.old_logprobs
    if tokens.rollout_logprobs is not None:
        sampled = tokens.rollout_logprobs
        base = logp if tokens.old_logprobs is None else tokens.old_logprobs.to(logp.dtype)
        log_weight = torch.where(counted, base - sampled.to(logp.dtype), 0.0)
        mismatch = _k3(log_weight, config)
    gap = torch.zeros_like(logp) if sampled is None else (logp - sampled.to(logp.dtype)).abs()
    # The effective sample size does not depend on the scale of the weights: the largest is made 1.
    any_row = counted.any()
    largest = torch.where(any_row, -_extreme(-log_weight, counted, float("inf")), 0.0)
    weights = torch.where(counted, (log_weight - largest).exp(), 0.0)
    squares = (weights.square().sum() * counted.sum()).clamp(min=torch.finfo(logp.dtype).tiny)
    return {
        "mismatch_kl": _mean(mismatch, counted),
        "ess": torch.where(any_row, weights.sum().square() / squares, 1.0),
        "logprob_diff_max": -_extreme(-gap, counted, 0.0),
    }
