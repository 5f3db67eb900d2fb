"""The trainer interface: what a backend must do to train one agent's policy.

    load -> [ train -> weights -> (save ... saved) ] -> export -> close

The trainer loop (mgrpo/pipeline/trainer_loop.py) knows policies only through this. It is rank 0: a backend of several
processes runs the same program on every rank, and those that are not `is_main` spend their life in run_commands().
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from mgrpo.config import RunConfig
from mgrpo.config.run import WarmStartConfig
from mgrpo.model.tokens import Tokenizer
from mgrpo.types import Int32, UInt8

Demos = Sequence[tuple[Int32, UInt8]]
"""Demonstrations: (tokens i32[L], loss_mask u8[L]) of each sequence."""


@dataclass(slots=True)
class MicroBatch:
    """R trajectories, right-padded to S tokens."""

    ids: torch.Tensor  # i64 (R, S)
    loss_mask: torch.Tensor  # bool (R, S), False on padding
    rollout_logprobs: torch.Tensor  # f32 (R, S), the sampler's
    lengths: torch.Tensor  # i64 (R,)
    advantages: torch.Tensor  # f32 (R,)
    weights: torch.Tensor  # f32 (R,), w(k, i) of the alignment
    old_logprobs: torch.Tensor | None = None  # f32 (R, S), the trainer's before the step; None: the sampler's
    token_advantages: torch.Tensor | None = (
        None  # f32 (R, S), of each sampled token; None: its row's advantage
    )

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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A durable state of the trainer. passed_over: what is wrong with each newer one, in words."""

    path: Path
    step: int
    passed_over: tuple[str, ...] = ()


class PolicyTrainer(ABC):
    """One agent's policy with its optimizer, and the ranks that it is divided over. A context manager: leaving it takes
    down what connects the ranks."""

    is_main = True
    """Whether this process is rank 0."""

    @classmethod
    @abstractmethod
    def open(cls, config: RunConfig, role: str, folder: Path) -> Self:
        """The trainer of `role` on this rank. folder: the agent's, the same on all ranks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(  # noqa: B027 - optional
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def warm_start(
        self,
        fresh: Path,
        start: Path,
        demos: Callable[[int], Demos],
        config: WarmStartConfig,
        lr: float,
        progress: Callable[[int, float], None],
    ) -> None:
        """Supervised steps from the policy in `fresh` to the one in `start`, before load(). demos(step): the batch of a
        step; lr: highest learning rate; progress(step, loss): called now and then."""

    @abstractmethod
    def load(self, start: Path) -> Checkpoint | None:
        """Load the policy in the folder `start` and, where there is one, the newest intact checkpoint over it, which is
        returned."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def policy_files(self) -> dict[str, bytes]:
        """The files of the policy's folder but its weights: what an engine is built from."""

    @abstractmethod
    def train(self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float) -> dict[str, float]:
        """One RL step: an optimizer step on each minibatch in turn; its metrics. `batches` hold the micro-batches of
        all ranks. recompute_old: the ratio's denominator is this policy before the step, not the sampler's report.
        Raises NumericsError where the step was not taken."""

    @abstractmethod
    def weights(self) -> bytes:
        """The weights as they are now, in the form that agents.<role>.engine takes: safetensors."""

    @abstractmethod
    def save(self, step: int) -> None:
        """Begin to write a checkpoint; saved() says when it is durable. The last one must be done."""

    @abstractmethod
    def saved(self, wait: bool) -> Checkpoint | None:
        """The checkpoint that has become durable since the last call, or None. wait: until the one that is being
        written is. Raises CheckpointError or DeadlineError where it could not be."""

    @abstractmethod
    def note_cursors(self, checkpoint: Checkpoint, cursors: Mapping[str, int]) -> dict[str, int]:
        """Keep with a checkpoint from which group on each role's tokens are needed to go on from it (`cursors`); the
        smallest of those that the kept checkpoints need."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the policy as a model folder in the layout of Hugging Face."""

    def heartbeat(self) -> None:  # noqa: B027 - optional: one process has nobody who waits
        """To be called where rank 0 waits, so that the other ranks wait on."""

    def run_commands(self) -> None:
        """The life of a rank that is not main: do what rank 0 does until it closes."""
        raise NotImplementedError(f"{type(self).__name__} has one process")

    def close(self) -> None:  # noqa: B027 - optional
        """No further step comes: the other ranks leave. Idempotent."""
