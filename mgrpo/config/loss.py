"""Settings of the policy loss. A setting that contradicts another, or could not change anything, is an
error."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo"]
RatioLevel = Literal["auto", "token", "sequence"]
Estimator = Literal["grpo", "dr_grpo", "rloo", "batch"]
KlEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "token_tis", "mis", "sequence_mask", "geometric"]

SEQUENCE_MEAN = frozenset({"grpo", "sapo", "gspo"})
"""Loss types that average over each sequence's own tokens first; dr_grpo and the rest divide a sum over
tokens."""

CLIPPED = frozenset({"grpo", "bnpo", "dr_grpo", "dapo", "gspo"})
"""Loss types whose token loss is the clipped one."""

SEQUENCE_CORRECTIONS = frozenset({"sequence_mask", "geometric"})
"""Corrections by one factor for the whole sequence."""

TEMPERATURES = (1e-6, 1e6)
"""Range of the temperature of logits: outside it logits / temperature, or the gradient, may not fit a float32."""

_LARGEST = 1e30  # of a setting that meets float32 numbers
_CORRECTION_FIELDS = ("correction_low", "correction_high", "veto")
_CORRECTION_BOUNDS: dict[Correction, tuple[float, float]] = {
    "none": (0.0, float("inf")),
    "token_tis": (0.0, 2.0),
    "mis": (0.5, 5.0),
    "sequence_mask": (0.0, 3.0),
    "geometric": (0.99, 1.01),
}


class GrpoLossConfig(BaseModel):
    """What `grpo_loss` and `linear_grpo_loss` compute. Names and meanings follow TRL 1.16 where it has the
    setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    loss_type: LossType = "grpo"
    """Shape of the token loss and of its normaliser: grpo, sapo and gspo average over sequences of their own
    token means; bnpo, dapo and cispo divide by the active tokens; dr_grpo divides by sequences x
    max_completion_length."""

    ratio_level: RatioLevel = "auto"
    """Importance ratio of each token, or the geometric mean over the sequence (GSPO). `auto`: sequence for
    gspo, token for every other loss type."""

    clip_eps_low: float = Field(default=0.2, ge=0.0, le=1.0)
    """The ratio is clipped below at 1 - clip_eps_low (not used by cispo and sapo)."""

    clip_eps_high: float = Field(default=0.2, ge=0.0, le=_LARGEST)
    """The ratio is clipped above at 1 + clip_eps_high; cispo clamps at clip_eps_high itself (5.0 is a usual
    value)."""

    delta: float | None = Field(default=None, gt=0.0, le=_LARGEST)
    """Two-sided clipping: cap of the unclipped ratio. None: no cap."""

    log_ratio_clip: float = Field(default=20.0, ge=1.0, le=60.0)
    """Bound, in nats, on every log-ratio before it is exponentiated: policy / old (token or sequence), training /
    inference engine, and reference / policy of the k3 estimator. Above it the ratio stays at exp(log_ratio_clip) and no
    gradient flows through it, so a ratio that would overflow is finite; below it nothing changes."""

    sapo_temperature_pos: float = Field(default=1.0, ge=1e-3, le=1e3)
    """sapo: temperature of the soft gate where the advantage is positive."""

    sapo_temperature_neg: float = Field(default=1.05, ge=1e-3, le=1e3)
    """sapo: temperature of the soft gate where the advantage is not positive."""

    kl_coef: float = Field(default=0.0, ge=0.0, le=1e6)
    """Weight of the KL penalty to the reference policy. Above 0 the call needs ref_logprobs."""

    kl_estimator: KlEstimator = "k3"
    """k1 = logp - ref; k2 = (logp - ref)^2 / 2; k3 = exp(d) - d - 1 with d = min(ref - logp, log_ratio_clip)."""

    entropy_coef: float = Field(default=0.0, ge=0.0, le=1e6)
    """Weight of the entropy bonus (subtracted from the loss)."""

    temperature: float = Field(default=1.0, ge=TEMPERATURES[0], le=TEMPERATURES[1])
    """Logits are divided by it: the temperature the tokens were sampled with."""

    correction: Correction = "none"
    """Correction for the mismatch of training and inference engines, a factor on the policy term (detached),
    from rho = exp(old_logprobs - rollout_logprobs): token_tis = min(rho, high); mis (IcePop) = rho inside
    [low, high], 0 outside; sequence_mask and geometric = the product or the geometric mean of rho over the
    sequence, inside [low, high], 0 outside."""

    correction_low: float | None = Field(default=None, ge=0.0, le=_LARGEST)
    """Lower bound; None: 0.5 for mis, 0 for sequence_mask, 0.99 for geometric. token_tis has none."""

    correction_high: float | None = Field(default=None, gt=0.0, le=_LARGEST)
    """Upper bound; None: 2 for token_tis, 5 for mis, 3 for sequence_mask, 1.01 for geometric."""

    veto: float | None = Field(default=None, gt=0.0, lt=1.0)
    """A trajectory with any response token of rho < veto (1e-4 is usual) leaves the policy term. None: no
    veto."""

    max_completion_length: int | None = Field(default=None, gt=0)
    """dr_grpo: the constant length every sequence is divided by."""

    estimator: Estimator = Field(default="grpo", exclude=True)
    """How a call that is given rewards makes group-relative advantages of them: over the standard deviation of the
    group, without it, leave-one-out, or over that of the batch. No setting of a run, whose advantages are its
    algorithm's."""

    advantage_eps: float = Field(default=1e-6, ge=0.0, le=_LARGEST, exclude=True)
    """Added to the standard deviation of the rewards by the estimators that divide by it."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.loss_type == "gspo" and self.ratio_level == "token":
            raise ValueError("ratio_level: token contradicts loss_type gspo, whose ratio is per sequence")
        if (self.loss_type == "dr_grpo") != (self.max_completion_length is not None):
            raise ValueError(
                f"max_completion_length: {self.max_completion_length} with loss_type {self.loss_type!r}; "
                "dr_grpo needs it and no other loss type uses it"
            )
        low, high = self.correction_bounds
        if self.correction != "none" and low >= high:
            raise ValueError(f"correction_low: {low} is not below correction_high, {high}")
        for name, why in self._unused():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {getattr(self, name)!r} has no effect {why}")
        return self

    def _unused(self) -> list[tuple[str, str]]:
        """Fields that cannot change the result under the other settings, with the reason."""
        unused: list[tuple[str, str]] = []
        with_loss = f"with loss_type {self.loss_type!r}"
        if self.loss_type not in CLIPPED:
            unused += [("clip_eps_low", with_loss), ("delta", with_loss)]
        if self.loss_type == "sapo":
            unused.append(("clip_eps_high", with_loss))
        else:
            unused += [("sapo_temperature_pos", with_loss), ("sapo_temperature_neg", with_loss)]
        if self.estimator in ("dr_grpo", "rloo"):
            unused.append(
                ("advantage_eps", f"with estimator {self.estimator!r}, which divides by no deviation")
            )
        if self.correction == "none":
            unused += [(name, "without a correction") for name in _CORRECTION_FIELDS]
        if self.correction == "token_tis":
            unused.append(("correction_low", "with correction 'token_tis', which only caps"))
        return unused

    @property
    def correction_bounds(self) -> tuple[float, float]:
        """(low, high) of the correction in force, defaults filled in; (0, inf) without one."""
        low, high = _CORRECTION_BOUNDS[self.correction]
        return (
            low if self.correction_low is None else self.correction_low,
            high if self.correction_high is None else self.correction_high,
        )

    @property
    def sequence_ratio(self) -> bool:
        """The importance ratio is the sequence's (its coefficient is not known row by row)."""
        return self.ratio_level == "sequence" or (self.ratio_level == "auto" and self.loss_type == "gspo")

    @property
    def sequence_mean(self) -> bool:
        """The loss averages each sequence's own tokens before it averages sequences."""
        return self.loss_type in SEQUENCE_MEAN
