"""A micro-batch of random rows, for tests of the optimizer step."""

from __future__ import annotations

from dataclasses import replace

import torch

from mgrpo.trainers.batch import MicroBatch
from tests.models import VOCAB

ROWS, WIDTH = 10, 12


def rows_of(seed: int, *, near: bool = False) -> MicroBatch:
    """Rows of different lengths, several sampled stretches, advantages of both signs and some zeros. near: the
    sampler's log-probs are close to those of a fresh tiny policy; without it many ratios meet the clip."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, WIDTH + 1, (ROWS,), generator=g)
    mask = torch.rand(ROWS, WIDTH, generator=g) < 0.6
    mask[:, 0] = False
    mask[:, 2] = True
    mask &= torch.arange(WIDTH)[None] < lengths[:, None]
    advantages = torch.randn(ROWS, generator=g)
    advantages[::4] = 0.0
    ids = torch.randint(0, VOCAB, (ROWS, WIDTH), generator=g)
    noise = torch.rand(ROWS, WIDTH, generator=g)
    return MicroBatch(
        ids=ids,
        loss_mask=mask,
        rollout_logprobs=-4 - noise if near else -5 * noise,
        lengths=lengths,
        advantages=advantages,
        weights=torch.rand(ROWS, generator=g) + 0.1,
    )


def routed(rows: MicroBatch, routers: int, experts: int, chosen: int, unknown: float = 0.3) -> MicroBatch:
    """The rows with a random choice of `chosen` experts at each router; of a share of the tokens, and at padding, none
    is known."""
    g = torch.Generator().manual_seed(int(rows.ids.sum()))
    draw = torch.rand(*rows.ids.shape, routers, experts, generator=g).argsort(-1)[..., :chosen]
    out = draw.to(torch.int16)
    out[torch.rand(rows.ids.shape, generator=g) < unknown] = -1
    out[torch.arange(rows.ids.shape[1]) >= rows.lengths[:, None]] = -1
    return replace(rows, experts=out)
