"""The interface of a policy loss: the term of one token, in log-probs, and what the sum of terms is divided by.

    loss = 1/D sum_j w_j n_j sum_t [ c_t term_t + kl_coef KL_t - entropy_coef entropy_t ]

over the sampled tokens t of trajectories j with weights w_j; c_t is the correction for sampler mismatch. A loss says
what term_t is, whether n_j is 1 / (tokens of j) or 1, and what D is. The rest is the same for every loss and not its
business: masks, weights, KL, entropy, corrections, and the gradient over the vocabulary.

A loss of one's own is a subclass with one method, `term`, and runs in two phases: log-probs of the sampled tokens chunk
by chunk, autograd through `term` on vectors of T tokens, then d loss / d hidden and d loss / d weight chunk by chunk.
T x V logits never exist. The built-in losses (builtin.py) have a `fused_id`, under which the fast backends know their
term and make the gradient in one phase.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mgrpo.config.loss import GrpoLossConfig

if TYPE_CHECKING:  # a launcher looks losses up without torch
    from torch import Tensor

Sum = TypeVar("Sum", "float", "Tensor")


@dataclass(frozen=True, slots=True)
class TermInputs:
    """T sampled tokens, without masked ones: vectors (T,) of one floating dtype on one device. (A built-in term gets
    every row of the call, those that do not count with log-prob 0.)"""

    logprobs: Tensor
    """log pi(token) in nats under the policy that is trained. Differentiable, as are entropy and ratio."""
    old_logprobs: Tensor
    """Under the policy that the ratio compares with; logprobs, detached, where the call was given none."""
    ratio: Tensor
    """exp(min(logprobs - old_logprobs, log_ratio_clip)); with a sequence-level ratio, that of the trajectory."""
    advantages: Tensor
    ref_logprobs: Tensor | None
    """Under the frozen reference policy; None unless the loss has a KL term or `uses_reference`."""
    entropy: Tensor
    """Of the policy at this token, in nats."""
    seq_id: Tensor
    """int64: which of the num_sequences trajectories a token belongs to."""
    num_sequences: int


class PolicyLoss(ABC):
    """One kind of loss under its settings. A subclass may take options as keyword arguments of its constructor, which
    agents.<role>.loss.options gives by name; it calls this constructor with the config."""

    fused_id: ClassVar[int | None] = None
    """The number by which the C++ and Triton kernels know `term`; None: they do not."""
    sequence_mean: ClassVar[bool] = False
    """Each trajectory's own tokens are averaged before trajectories are (n_j = 1 / its tokens)."""
    sequence_ratio: ClassVar[bool] = False
    """What ratio_level "auto" means: the ratio is the trajectory's."""
    zero_without_advantage: ClassVar[bool] = False
    """`term` and its derivatives are 0 at a token whose advantage is 0, whatever its log-probs: such tokens need not be
    computed. A subclass with another `term` says it again."""
    uses_reference: ClassVar[bool] = False
    """`term` reads ref_logprobs, so a reference policy is needed without a KL term too."""
    uses_entropy: ClassVar[bool] = True
    """`term` may read entropy, so `policy_loss` needs it. A subclass with another `term` says it again."""

    def __init__(self, config: GrpoLossConfig) -> None:
        self.config = config

    def __init_subclass__(cls) -> None:
        if "term" in vars(cls):  # what an inherited term had is not known of this one
            cls.zero_without_advantage = vars(cls).get("zero_without_advantage", False)
            cls.uses_entropy = vars(cls).get("uses_entropy", True)

    @abstractmethod
    def term(self, tokens: TermInputs) -> Tensor:
        """Loss of each token before any weight, (T,), differentiable in logprobs, ratio and entropy."""

    def denominator(self, weights: Sum, tokens: Sum) -> Sum:
        """D, additive over micro-batches, from the sums over trajectories of w_j and of w_j x sampled tokens."""
        return weights if self.sequence_mean else tokens

    def ratio_bounds(self) -> tuple[float, float]:
        """Bounds at which the term holds a ratio below (advantage < 0) and above (advantage > 0), for metrics."""
        return -float("inf"), float("inf")

    @property
    def fused(self) -> bool:
        """The fast backends compute the term themselves. Only for a built-in type: a class found by another name may
        have inherited its fused_id and changed its term."""
        return self.fused_id is not None and self.config.is_built_in

    @property
    def has_sequence_ratio(self) -> bool:
        """The importance ratio is the trajectory's, so a token's coefficient is not known row by row."""
        level = self.config.ratio_level
        return level == "sequence" or (level == "auto" and self.sequence_ratio)

    @property
    def every_token_acts(self) -> bool:
        """A token may move the gradient although its advantage is 0."""
        return self.config.kl_coef > 0 or self.config.entropy_coef > 0 or not self.zero_without_advantage

    @property
    def needs_reference(self) -> bool:
        """The loss compares with a frozen reference policy."""
        return self.config.kl_coef > 0 or self.uses_reference
