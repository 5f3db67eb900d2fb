"""Settings of the policy loss. A setting that contradicts another, or could not change anything, is an error. What the
losses compute is in mgrpo/losses."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mgrpo.config.settings import Options
from mgrpo.plugins import known_names

LOSS_GROUP = "mgrpo.losses"
"""Entry points of installed packages that bring a loss."""

RatioLevel = Literal["auto", "token", "sequence"]
Estimator = Literal["grpo", "dr_grpo", "rloo", "batch"]
KlEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "token_tis", "mis", "sequence_mask", "geometric"]

_CLIP = ("clip_eps_low", "clip_eps_high", "delta")
TERM_SETTINGS: dict[str, tuple[str, ...]] = {
    "grpo": _CLIP,
    "bnpo": _CLIP,
    "dr_grpo": (*_CLIP, "max_completion_length"),
    "dapo": _CLIP,
    "cispo": ("clip_eps_high",),
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "gspo": _CLIP,
}
"""The built-in types, each with the settings that act on its term or normaliser and not on every loss."""

WITHOUT_DEVIATION = ("dr_grpo", "rloo")
"""Estimators that divide by no deviation of the rewards."""

SEQUENCE_CORRECTIONS = frozenset({"sequence_mask", "geometric"})
"""Corrections by one factor for the whole sequence."""

TEMPERATURES = (1e-6, 1e6)
"""Range of the temperature of logits: outside it logits / temperature, or the gradient, may not fit a float32."""

_LARGEST = 1e30  # of a setting that meets float32 numbers
_LARGEST_CLIP_OF_PRODUCT = 30.0  # e^30 e^30 is what one ratio held at 60 nats may be
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

    type: str = "grpo"
    """Term of a token and normaliser: grpo, sapo and gspo average over sequences of their own token means; bnpo,
    dapo and cispo divide by the active tokens; dr_grpo divides by sequences x max_completion_length. Or a loss of your
    own: "package.module:Class", a subclass of mgrpo.losses.base.PolicyLoss, or a name that an installed package
    gives one."""

    options: Options = Field(default_factory=dict)
    """Keyword arguments of a loss of your own. The built-in types have none."""

    ratio_level: RatioLevel = "auto"
    """Importance ratio of each token, or the geometric mean over the sequence (GSPO). `auto`: sequence for gspo, token
    for every other built-in type."""

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

    kl_bias_correction: bool = False
    """The KL estimate is multiplied by the importance ratio (of the token or of the sequence, not clipped), through
    which its gradient flows too: the gradient is then that of the KL, without bias. At ratio 1 the value is the same.
    It takes the loss two phases (docs/kernels.md)."""

    entropy_coef: float = Field(default=0.0, ge=0.0, le=1e6)
    """Weight of the entropy bonus (subtracted from the loss)."""

    temperature: float = Field(default=1.0, ge=TEMPERATURES[0], le=TEMPERATURES[1])
    """Logits are divided by it: the temperature the tokens were sampled with."""

    correction: Correction = "none"
    """Correction for the mismatch of training and inference engines, a factor on the policy term (detached), from rho =
    exp(old_logprobs - rollout_logprobs): token_tis = min(rho, high); mis (IcePop) = rho inside [low, high], 0 outside;
    sequence_mask and geometric = the product or the geometric mean of rho over the sequence, inside [low, high], 0
    outside. A token whose rollout log-prob is not finite (the sampler reported none) has rho 1 and no part in the
    geometric mean."""

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

    @model_validator(mode="before")
    @classmethod
    def _key_is_type(cls, given: Any) -> Any:
        if isinstance(given, dict) and "loss_type" in given:
            raise ValueError(f"loss_type: unknown key; write type = {given['loss_type']!r}")
        return given

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if not self.is_built_in and ":" not in self.type:
            installed = {point.name: point for point in entry_points(group=LOSS_GROUP)}
            if self.type not in installed:
                names = known_names(dict.fromkeys(TERM_SETTINGS, ""), installed)
                raise ValueError(f"type: {self.type!r} is unknown, expected {names}")
        if self.type == "gspo" and self.ratio_level == "token":
            raise ValueError("ratio_level: token contradicts type gspo, whose ratio is per sequence")
        if self.type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: missing, and type 'dr_grpo' divides by it")
        low, high = self.correction_bounds
        if self.correction != "none" and low >= high:
            raise ValueError(f"correction_low: {low} is not below correction_high, {high}")
        if self.kl_bias_correction and self.log_ratio_clip > _LARGEST_CLIP_OF_PRODUCT:
            raise ValueError(
                f"log_ratio_clip: {self.log_ratio_clip} is above {_LARGEST_CLIP_OF_PRODUCT}, and kl_bias_correction "
                "multiplies two ratios held by it"
            )
        for name, why in self._unused():
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}: {getattr(self, name)!r} has no effect {why}")
        return self

    def _unused(self) -> list[tuple[str, str]]:
        """Fields that cannot change the result under the other settings, with the reason."""
        acting = TERM_SETTINGS.get(self.type, ())
        special = sorted({name for names in TERM_SETTINGS.values() for name in names})
        unused = [(name, f"with type {self.type!r}") for name in special if name not in acting]
        if self.is_built_in:
            unused.append(("options", f"with type {self.type!r}, which has none"))
        if self.estimator in WITHOUT_DEVIATION:
            unused.append(
                ("advantage_eps", f"with estimator {self.estimator!r}, which divides by no deviation")
            )
        if not self.kl_coef:
            unused.append(("kl_bias_correction", "with kl_coef 0"))
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
    def is_built_in(self) -> bool:
        """The type is one of mgrpo's own."""
        return self.type in TERM_SETTINGS
