"""What the ranks of one trainer do together: load the policy, take steps, gather its weights, write checkpoints.

Rank 0 calls; the others `follow`, and do the same at its word. With one rank there is nobody to tell, and the policy is
whole where it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mgrpo.config import RunConfig
from mgrpo.config.policy import PolicyConfig
from mgrpo.model.policy import Policy, load_policy, load_reference
from mgrpo.trainer.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    latest_checkpoint,
    prepare_folder,
    restore_checkpoint,
    snapshot,
)
from mgrpo.trainer.ranks import Ranks
from mgrpo.trainer.step import Learner, MiniBatch, new_learner


class Crew:
    """One rank's part, and for rank 0 the voice that the others follow."""

    def __init__(self, config: RunConfig, role: str, folder: Path, ranks: Ranks) -> None:
        """folder: the agent's, the same on all ranks (on several servers: a shared file system)."""
        torch.set_num_threads(config.trainer.threads)
        torch.manual_seed(config.seed)
        self._config, self._agent, self._ranks = config, config.agents[role], ranks
        self._root = folder / "checkpoints"
        self._writer = CheckpointWriter(
            self._root, config.trainer.keep_checkpoints, ranks.files, leads=ranks.leads
        )
        self._learner: Learner | None = None
        self._whole: Policy | None = None
        self._ended = False

    # -- rank 0 ----------------------------------------------------------------------------------------------------

    def begin(self, start: Path) -> Checkpoint | None:
        """Load the policy RL starts from and its newest intact checkpoint, and return that one."""
        checkpoint = latest_checkpoint(self._root)
        self._tell("begin", (start, checkpoint))
        if self._ranks.size > 1:
            self._whole = load_policy(start, on_host(self._agent.policy))
        self._begin(start, checkpoint)
        return checkpoint

    def train(
        self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float | None = None
    ) -> dict[str, float]:
        """One RL step, as Learner.train; `batches` hold the micro-batches of all ranks."""
        size = self._ranks.size
        shares = [([batch.share(rank, size) for batch in batches], recompute_old, lr) for rank in range(size)]
        self._ranks.tell("train", shares)
        return self._train(*shares[0])

    def policy(self) -> Policy:
        """The policy as it is now, whole. It changes with the next call, and with the next step."""
        self._tell("gather")
        self._gather()
        return self._whole if self._whole is not None else self._own.policy

    def checkpoint(self, step: int) -> None:
        """Begin to write a checkpoint; `settle` says when it is durable. The last one must be settled."""
        prepare_folder(self._root, step)
        self._tell("checkpoint", step)
        self._checkpoint(step)

    def settle(self, wait: bool) -> Checkpoint | None:
        """As CheckpointWriter.settle."""
        return self._writer.settle(wait)

    def alive(self) -> None:
        """To be called where rank 0 waits, so that the others wait on."""
        self._ranks.alive()

    def end(self) -> None:
        """Nothing more comes: the other ranks leave. Said once."""
        if not self._ended:
            self._ended = True
            self._tell("end")

    # -- the others ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what rank 0 says until it says "end". Raises when it cannot be heard any more."""
        self._ranks.obey_signals()
        while True:
            word, part = self._ranks.hear()
            if word == "end":
                break
            if word == "begin":
                self._begin(*part)
            elif word == "train":
                self._train(*part)
            elif word == "gather":
                self._gather()
            else:
                assert word == "checkpoint", f"rank 0 said {word!r}"
                self._writer.settle(wait=True)
                self._checkpoint(part)
        self._writer.settle(wait=True)

    # -- every rank ------------------------------------------------------------------------------------------------

    @property
    def _own(self) -> Learner:
        assert self._learner is not None, "begin() comes first"
        return self._learner

    def _begin(self, start: Path, checkpoint: Checkpoint | None) -> None:
        policy = self._loaded(load_policy(start, self._agent.policy))
        reference = None
        if self._agent.loss.kl_coef > 0:
            reference = load_reference(policy, start)
            if reference.model is not policy.model:
                reference = self._loaded(reference)
        self._learner = new_learner(self._agent, policy, reference, self._ranks)
        if checkpoint is not None:
            restore_checkpoint(checkpoint, policy, self._learner.optimizer, self._ranks.files)

    def _loaded(self, policy: Policy) -> Policy:
        if self._ranks.size == 1:
            return policy
        from mgrpo.trainer.shard import ShardedPolicy

        return ShardedPolicy(policy, self._ranks)

    def _train(self, batches: Sequence[MiniBatch], recompute_old: bool, lr: float | None) -> dict[str, float]:
        return self._own.train(batches, recompute_old, lr)

    def _gather(self) -> None:
        if self._ranks.size > 1:
            self._own.policy.gather_into(self._whole)  # type: ignore[attr-defined]

    def _checkpoint(self, step: int) -> None:
        if self._ranks.size > 1:
            self._own.policy.let_go()  # type: ignore[attr-defined]
        self._writer.begin(step, snapshot(self._own.policy, self._own.optimizer))

    def _tell(self, word: str, part: Any = None) -> None:
        self._ranks.tell(word, [part] * self._ranks.size)


def on_host(policy: PolicyConfig) -> PolicyConfig:
    """The same weights in main memory, never trained there."""
    return policy.model_copy(
        update={
            "device": "cpu",
            "attention": "auto",
            "activation_offload": False,
            "gradient_checkpointing": False,
        }
    )
