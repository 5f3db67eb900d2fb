"""Where the engine sent the tokens of a micro-batch, for routing replay: gathered from its trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mgrpo.batcher.plan import Buffers, Plan
from mgrpo.model.routing_replay import UNKNOWN, as_forced
from mgrpo.pipeline.batch_metrics import Member


def experts_of_rows(plan: Plan, buffers: Buffers, members: Sequence[Member]) -> torch.Tensor | None:
    """i16 (R, S, N, k) of the real rows of Batcher.write_padded's buffers; None where no engine reported any. Raises
    ValueError where two reports differ in N or k."""
    rows = np.flatnonzero(buffers["lengths"] > 0)
    out = None
    for place, row in enumerate(rows):
        trajectory = members[int(buffers["seg_traj"][row])].trajectory
        if trajectory.experts is None:
            continue
        shape = trajectory.experts.shape[1:]
        if out is None:
            out = np.full((len(rows), buffers["ids"].shape[1], *shape), UNKNOWN, np.int16)
        if shape != out.shape[2:]:
            raise ValueError(
                f"{trajectory.query}/{trajectory.rollout} {trajectory.role}/{trajectory.invocation} has experts of "
                f"shape {shape} a token, others of its micro-batch {out.shape[2:]}"
            )
        segment = trajectory.segments()[int(plan.rows.segment[buffers["seg_row"][row]])]
        out[place, : buffers["lengths"][row]] = as_forced(trajectory.experts[segment])
    return None if out is None else torch.from_numpy(out)
