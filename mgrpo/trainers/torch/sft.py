"""SFT, the cold start of RL: a few hundred supervised steps on the task's demonstrations, before RL.

Loss: mean cross-entropy of the action tokens of a batch (loss_mask 1). AdamW; its rate is that of schedule.py. RL
selects among strategies that have some probability; this is where they come from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from mgrpo.config.run import SftConfig
from mgrpo.model.policy import Policy
from mgrpo.trainers.base import Demos
from mgrpo.trainers.torch.learner import adamw_way
from mgrpo.trainers.torch.schedule import share_of_lr


def sft(
    policy: Policy,
    demos: Callable[[int], Demos],
    config: SftConfig,
    lr: float,
    progress: Callable[[int, float], None],
) -> None:
    """Train in place; demos(step) gives the batch of a step, lr is the highest learning rate, progress(step, loss) is
    called at every 25th step."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=config.betas, **adamw_way(policy.device))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * share_of_lr(config, step, config.steps)
        loss = demo_loss(policy, demos(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
        optimizer.step()
        if step % 25 == 24 or step == config.steps - 1:
            progress(step + 1, float(loss.detach()))


def demo_loss(policy: Policy, demos: Demos) -> torch.Tensor:
    """Cross-entropy of the action tokens, averaged over the batch. Masked tokens never reach the vocabulary."""
    tokens, mask, lengths = pad(demos)  # (R, S)
    active = mask[:, 1:]
    hidden = policy.hidden_before(tokens, lengths, active)  # (T, H)
    targets = policy.vocabulary.classes(tokens[:, 1:][active])
    return F.cross_entropy(policy.vocabulary.logits(hidden, policy.head_weight), targets.to(hidden.device))


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
