"""The built-in losses: the one place where a term is defined. r is the ratio, A the advantage.

    grpo, bnpo, dapo, dr_grpo, gspo   -min(min(r, delta) A, clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A)
    cispo                             -min(r, clip_eps_high) A logp, the first factor detached
    sapo                              -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A

The kernels compute the derivatives of these terms under their fused_id (csrc/loss_rows.cpp, kernels/grpo_loss.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgrpo.losses.base import PolicyLoss, Sum, TermInputs

if TYPE_CHECKING:
    from torch import Tensor


class TokenMean(PolicyLoss):
    """bnpo, dapo: the clipped term; the sum over tokens is divided by the number of active tokens."""

    fused_id = 0
    zero_without_advantage = True
    uses_entropy = False

    def term(self, tokens: TermInputs) -> Tensor:
        delta = self.config.delta
        clipped = tokens.ratio.clamp(*self.ratio_bounds())
        unclipped = tokens.ratio if delta is None else tokens.ratio.clamp(max=delta)
        return -(unclipped * tokens.advantages).minimum(clipped * tokens.advantages)

    def ratio_bounds(self) -> tuple[float, float]:
        return 1.0 - self.config.clip_eps_low, 1.0 + self.config.clip_eps_high


class Grpo(TokenMean):
    """grpo: the mean over trajectories of their own token means."""

    sequence_mean = True


class Gspo(Grpo):
    """gspo: grpo with the ratio of the trajectory."""

    sequence_ratio = True


class DrGrpo(TokenMean):
    """dr_grpo: every trajectory is divided by the same length."""

    def denominator(self, weights: Sum, tokens: Sum) -> Sum:
        length = self.config.max_completion_length
        assert length is not None, "the config refuses dr_grpo without it"
        return weights * length


class Cispo(PolicyLoss):
    """cispo: the clamped ratio weighs the log-prob and passes no gradient."""

    fused_id = 1
    zero_without_advantage = True
    uses_entropy = False

    def term(self, tokens: TermInputs) -> Tensor:
        held = tokens.ratio.detach().clamp(max=self.config.clip_eps_high)
        return -held * tokens.advantages * tokens.logprobs

    def ratio_bounds(self) -> tuple[float, float]:
        return -float("inf"), self.config.clip_eps_high


class Sapo(PolicyLoss):
    """sapo: a soft gate in place of the clip, mean over trajectories of their own token means."""

    fused_id = 2
    sequence_mean = True
    zero_without_advantage = True
    uses_entropy = False

    def term(self, tokens: TermInputs) -> Tensor:
        a, ratio = tokens.advantages, tokens.ratio
        positive = ratio.new_full(ratio.shape, self.config.sapo_temperature_pos)
        tau = positive.where(a > 0, self.config.sapo_temperature_neg)
        return -a * (tau * (ratio - 1.0)).sigmoid() * 4.0 / tau


KINDS: dict[str, type[PolicyLoss]] = {
    "grpo": Grpo,
    "bnpo": TokenMean,
    "dr_grpo": DrGrpo,
    "dapo": TokenMean,
    "cispo": Cispo,
    "sapo": Sapo,
    "gspo": Gspo,
}
"""The built-in types by name."""
