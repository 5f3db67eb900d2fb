"""Losses as a user writes them, found by their import path in the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mgrpo.config.loss import GrpoLossConfig
from mgrpo.losses.base import PolicyLoss, TermInputs
from mgrpo.losses.builtin import Grpo

HERE = "tests.own_losses"


class OwnGrpo(PolicyLoss):
    """The built-in grpo, written again from log-probs."""

    sequence_mean = True
    zero_without_advantage = True
    uses_entropy = False

    def __init__(self, config: GrpoLossConfig, *, low: float = 0.2, high: float = 0.2) -> None:
        super().__init__(config)
        if not 0 <= low <= 1:
            raise ValueError(f"low: {low} is outside [0, 1]")
        self.low, self.high = low, high

    def term(self, tokens: TermInputs) -> Tensor:
        ratio = (tokens.logprobs - tokens.old_logprobs).exp()
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        return -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)


class OwnGspo(OwnGrpo):
    """The clip on the ratio that the config's ratio_level asks for."""

    zero_without_advantage = True

    def term(self, tokens: TermInputs) -> Tensor:
        clipped = tokens.ratio.clamp(1 - self.low, 1 + self.high)
        return -torch.minimum(tokens.ratio * tokens.advantages, clipped * tokens.advantages)


class Pull(PolicyLoss):
    """No built-in loss: a bounded step along the advantage, a spring to the old log-prob that acts without an advantage
    too, and a weight on the entropy of each token that depends on its trajectory."""

    def __init__(self, config: GrpoLossConfig, *, spring: float, entropy: float = 0.0) -> None:
        super().__init__(config)
        self.spring, self.entropy = spring, entropy

    def term(self, tokens: TermInputs) -> Tensor:
        return pull(
            tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.entropy, tokens.seq_id, self.spring,
            self.entropy,
        )  # fmt: skip


def pull(
    logprobs: Tensor, old: Tensor, a: Tensor, entropy: Tensor, seq_id: Tensor, spring: float, weight: float
) -> Tensor:
    gap = logprobs - old
    return -a * gap.tanh() + spring * gap.square() - weight / (1 + seq_id) * entropy


class ToReference(PolicyLoss):
    """Squared distance from the reference's log-prob: a term that needs a reference policy without a KL term."""

    uses_reference = True

    def term(self, tokens: TermInputs) -> Tensor:
        assert tokens.ref_logprobs is not None
        return (tokens.logprobs - tokens.ref_logprobs).square()


class Doubled(Grpo):
    """Another term under a built-in's fused_id."""

    def term(self, tokens: TermInputs) -> Tensor:
        return 2.0 * super().term(tokens)


class Mean(PolicyLoss):
    """A mistake: one number instead of one a token."""

    def term(self, tokens: TermInputs) -> Tensor:
        return tokens.logprobs.mean()


class NoLoss:
    """Not a PolicyLoss."""
