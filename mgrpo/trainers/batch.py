"""What a trainer trains on: trajectories as right-padded rows, in the minibatches of one RL step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(slots=True)
class MicroBatch:
    """R rows, right-padded to S tokens: a trajectory each, or one of its segments."""

    ids: torch.Tensor  # i64 (R, S)
    loss_mask: torch.Tensor  # bool (R, S), False on padding
    rollout_logprobs: torch.Tensor  # f32 (R, S), the sampler's
    lengths: torch.Tensor  # i64 (R,)
    advantages: torch.Tensor  # f32 (R,)
    weights: torch.Tensor  # f32 (R,), w(k, i) of the alignment over the rows of the trajectory
    old_logprobs: torch.Tensor | None = None  # f32 (R, S), the trainer's before the step; None: the sampler's
    token_advantages: torch.Tensor | None = (
        None  # f32 (R, S), of each sampled token; None: its row's advantage
    )
    prefix: torch.Tensor | None = None
    """i64 (P,), tokens that rows of this and of neighbouring micro-batches begin with: they are computed once for all
    of these, in two passes. None: this micro-batch shares with no other."""
    experts: torch.Tensor | None = None
    """i16 (R, S, N, k), where the engine sent each token, at each of N routers; -1: nobody recorded it. None: routing
    is not replayed."""

    def rows(self, keep: torch.Tensor) -> MicroBatch:
        """The trajectories where keep (bool[R]) is True, cut to their own width."""
        lengths = self.lengths[keep]
        width = int(lengths.max()) if len(lengths) else 0
        return MicroBatch(
            self.ids[keep, :width],
            self.loss_mask[keep, :width],
            self.rollout_logprobs[keep, :width],
            lengths,
            self.advantages[keep],
            self.weights[keep],
            None if self.old_logprobs is None else self.old_logprobs[keep, :width],
            None if self.token_advantages is None else self.token_advantages[keep, :width],
            self.prefix,
            None if self.experts is None else self.experts[keep, :width],
        )

    def with_advantage(self) -> torch.Tensor:
        """bool (R,): the trajectories in which a sampled token has an advantage other than 0."""
        if self.token_advantages is None:
            return self.advantages != 0
        return ((self.token_advantages != 0) & self.loss_mask).any(1)

    def active(self) -> ActiveTokens:
        """The sampled tokens, trajectory after trajectory."""
        # The hidden state of t - 1 scores token t; the first token is never sampled.
        mask = self.loss_mask[:, 1:]
        old = self.rollout_logprobs if self.old_logprobs is None else self.old_logprobs
        return ActiveTokens(
            mask=mask,
            targets=self.ids[:, 1:][mask],
            rollout_logprobs=self.rollout_logprobs[:, 1:][mask],
            old_logprobs=old[:, 1:][mask],
            cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32),
            token_advantages=None if self.token_advantages is None else self.token_advantages[:, 1:][mask],
        )


@dataclass(slots=True)
class ActiveTokens:
    """T sampled tokens of R trajectories."""

    mask: torch.Tensor  # bool (R, S - 1)
    targets: torch.Tensor  # i64 (T,)
    rollout_logprobs: torch.Tensor  # f32 (T,)
    old_logprobs: torch.Tensor  # f32 (T,)
    cu_seqlens: torch.Tensor  # i32 (R + 1,)
    token_advantages: torch.Tensor | None = None  # f32 (T,)

    def to(self, device: torch.device) -> ActiveTokens:
        """On the policy's device, but for the mask, which the host looks at."""
        return replace(
            self,
            targets=self.targets.to(device),
            rollout_logprobs=self.rollout_logprobs.to(device),
            old_logprobs=self.old_logprobs.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            token_advantages=None if self.token_advantages is None else self.token_advantages.to(device),
        )


@dataclass(slots=True)
class MiniBatch:
    """The trajectories of one optimizer step and what their weighted sum is divided by."""

    micro: Sequence[MicroBatch]
    denominator: float

    def shard(self, rank: int, size: int) -> MiniBatch:
        """What one of `size` ranks trains on: the batcher assigns micro-batches to ranks in turn."""
        return self if size == 1 else MiniBatch(self.micro[rank::size], self.denominator)
