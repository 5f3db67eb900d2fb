"""SFT, the cold start of RL: a few hundred supervised steps on the task's demonstrations, before RL.

Loss: mean cross-entropy of the action tokens of a batch (loss_mask 1). AdamW; its rate is that of schedule.py. RL
selects among strategies that have some probability; this is where they come from.

With several ranks each takes its share of a batch; those of a tp or cp group take one together, and each its tokens at
the vocabulary head. All divide by the action tokens of the whole batch, and gradients are summed over the ranks, so the
share changes rounding and nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from mgrpo.config.run import SftConfig
from mgrpo.model.policy import Policy
from mgrpo.trainers.base import Demos
from mgrpo.trainers.torch.learner import adamw
from mgrpo.trainers.torch.mesh import clip_gradient
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.schedule import share_of_lr

Share = tuple[Demos, int | None]
"""A rank's part of a batch, and the action tokens of the whole batch; None: the part is the whole."""


class Sft:
    """A policy in SFT. With several ranks each has one, and all take the same steps: step() is a collective."""

    def __init__(self, policy: Policy, config: SftConfig, lr: float, ranks: Ranks) -> None:
        self.policy, self._config, self._lr, self._ranks = policy, config, lr, ranks
        self._optimizer = adamw(policy, lr, betas=config.betas)

    def step(self, step: int, share: Share) -> float | None:
        """One update from this rank's share; the loss of the batch at every 25th step and the last."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * share_of_lr(self._config, step, self._config.steps)
        loss = demo_loss(self.policy, *share)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradient(list(self.policy.parameters()), 1.0)
        self._optimizer.step()
        if step % 25 == 24 or step == self._config.steps - 1:
            return float(sum(self._ranks.gather(float(loss.detach()))))
        return None


def shares(demos: Demos, size: int) -> list[Share]:
    """A batch divided over `size` ranks. A rank without any takes one with nothing to learn, since all gather the
    policy's weights."""
    if size == 1:
        return [(demos, None)]
    total = sum(int((mask[1:] != 0).sum()) for _, mask in demos)
    blank = [(demos[0][0], np.zeros_like(demos[0][1]))]
    return [(demos[rank::size] or blank, total) for rank in range(size)]


def demo_loss(policy: Policy, demos: Demos, total: int | None = None) -> torch.Tensor:
    """Cross-entropy of the action tokens, averaged over the batch, or summed over them and divided by `total`; on ranks
    that have the same rows, this rank's part of it. Masked tokens never reach the vocabulary."""
    tokens, mask, lengths = pad(demos)  # (R, S)
    active = mask[:, 1:]
    hidden = policy.hidden_before(tokens, lengths, active)  # (T, H), or this rank's share
    targets = policy.vocabulary.classes(tokens[:, 1:][active]).to(hidden.device)
    if (share := policy.share_of(active)) is not None:
        total = share.total if total is None else total
        targets = targets[share.own]
    logits = policy.vocabulary.logits(hidden, policy.head_weight)
    if total is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / total


def pad(demos: Demos) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (tokens i64[R, S], mask bool[R, S], lengths i64[R])."""
    lengths = torch.tensor([len(t) for t, _ in demos])
    width = int(lengths.max())
    tokens = np.zeros((len(demos), width), np.int64)
    mask = np.zeros((len(demos), width), np.bool_)
    for row, (ids, loss_mask) in enumerate(demos):
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = loss_mask
    return torch.from_numpy(tokens), torch.from_numpy(mask), lengths
