"""The trainer interface: what a backend must do to train one agent's policy.

    load -> [ train -> weights -> (save ... saved) ] -> export -> close

The trainer loop (mgrpo/pipeline/trainer_loop.py) knows policies only through this. It is rank 0: a backend of several
processes runs the same program on every rank, and those that are not `is_main` spend their life in run_commands().
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mgrpo.config import AgentView
from mgrpo.config.run import SftConfig
from mgrpo.errors import ConfigError
from mgrpo.model.tokens import Tokenizer
from mgrpo.profiling.window import begin_step, end_step
from mgrpo.types import Int32, Probe, UInt8

if TYPE_CHECKING:  # a launcher looks trainers up without torch
    from torch import Tensor

    from mgrpo.trainers.batch import MiniBatch

Demos = Sequence[tuple[Int32, UInt8]]
"""Demonstrations: (tokens i32[L], loss_mask u8[L]) of each sequence."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A durable state of the trainer. passed_over: what is wrong with each newer one, in words."""

    path: Path
    step: int
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepCost:
    """What an RL step took, all ranks together, and what their devices could do."""

    flops: float
    """Of the model: forward and backward of the rows that were computed, what is computed twice counted once."""
    peak_flops: float
    """FLOP/s of all ranks' devices at the dtype of the products; NaN where a device is not known."""
    peak_memory: float
    """Bytes on the fullest device, or of the fullest process on a CPU, at the highest since the step before."""


class PolicyTrainer(ABC):
    """One agent's policy with its optimizer, and the ranks that it is divided over. A context manager: leaving it takes
    down what connects the ranks."""

    is_main = True
    """Whether this process is rank 0."""

    @classmethod
    @abstractmethod
    def open(cls, view: AgentView, folder: Path) -> Self:
        """The trainer of the agent's policy on this rank. folder: the agent's, the same on all ranks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(  # noqa: B027 - optional
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def sft(
        self,
        fresh: Path,
        start: Path,
        demos: Callable[[int], Demos],
        config: SftConfig,
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

    @property
    def shares_prefixes(self) -> bool:
        """After load(): whether train() computes once what rows of a micro-batch begin with, so that micro-batches are
        packed by the tokens that are left. A trainer that computes each row whole says False."""
        return False

    @property
    def why_not_shared(self) -> str:
        """After load(): why shares_prefixes is False although policy.share_prefixes asks for it, in words; else ""."""
        return ""

    @abstractmethod
    def policy_files(self) -> dict[str, bytes]:
        """The files of the policy's folder but its weights: what an engine is built from."""

    @abstractmethod
    def train(self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float) -> dict[str, float]:
        """One RL step: an optimizer step on each minibatch in turn; its metrics. `batches` hold the micro-batches of
        all ranks. recompute_old: the ratio's denominator is this policy before the step, not the sampler's report.
        Raises NumericsError where the step was not taken."""

    @contextlib.contextmanager
    def profiled(self, step: int, report: Callable[[str], object]) -> Iterator[None]:
        """Around all that is done for one RL step, counted from 1: where [profile] asks for it, profilers look at it on
        the ranks that it names. report: takes lines for people."""
        begin_step(step, report)
        yield
        end_step(step)

    def cost(self) -> StepCost | None:
        """Of the last train(); None where it is not known."""
        return None

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as they are now, in the form that agents.<role>.engine takes: tensor after tensor, each whole,
        under the names of a checkpoint, in the same order every time; adapters are merged, or come alone where
        engine.adapter_only says so. A tensor is good until the next one is asked for, and nobody writes to it. With
        the next call of the trainer an iterator that was not read to its end is useless."""

    def probe(self) -> Probe | None:
        """What the weights as they are now say of a fixed prompt; engines are compared with it. None: they are not,
        which a trainer needs whose weights() are not those that it trains."""
        return None

    def open_direct(self, servers: Sequence[str], report: Callable[[str], None]) -> None:
        """Once, after load(), where agents.<role>.engine takes weights from the trainer itself: prepare to send them to
        the servers at these addresses. report: takes a line for people, from the thread that calls this trainer. Raises
        ConfigError where that cannot be."""
        raise ConfigError(
            f'{type(self).__name__} sends no weights to servers; choose another engine.sync than "nccl" and "gloo"'
        )

    def publish_direct(self, label: str) -> None:
        """Bring the weights as they are now to all servers that answer, labelled. Those that do not get them in a later
        heartbeat(). A collective of all ranks. Raises ConfigError for a server that never can take them."""
        raise NotImplementedError(f"{type(self).__name__} sends no weights to servers")

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
        """To be called where rank 0 waits, so that the other ranks wait on, and servers that have missed a version get
        it (publish_direct)."""

    def run_commands(self) -> None:
        """The life of a rank that is not main: do what rank 0 does until it closes."""
        raise NotImplementedError(f"{type(self).__name__} has one process")

    def close(self) -> None:  # noqa: B027 - optional
        """No further step comes: the other ranks leave. Idempotent."""
