"""What a run sends and keeps a step: weight versions, trajectories, the store's rows."""

from __future__ import annotations

from dataclasses import dataclass

from mgrpo.config import AgentView, RunConfig
from mgrpo.planning.assumptions import Assumptions
from mgrpo.planning.step import Parameters
from mgrpo.trajectory_log.format import FRAME, PER_TOKEN

RECORD = FRAME.size + 120  # bytes of a log record beside its tokens: frame, names, scores
ROW = 200  # bytes of a trajectory at the store (docs/transport.md)
PATCHES = ((1e-6, 0.0068, 0.0173), (1e-5, 0.0218, 0.0807), (1e-4, 0.0958, 0.26))
"""(learning rate, least, most) share of a whole bfloat16 version that a patch takes: docs/weights.md."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes and counts of one agent and one RL step, but for `log_kept`."""

    version: int
    """A whole version of the weights, as it travels."""
    patch: tuple[int, int]
    """A patch, from and to."""
    trajectories: int
    tokens: int
    """Expected, of all trajectories."""
    log: int
    """The trajectory log."""
    log_most: int
    """The same if every trajectory were of the greatest length."""
    log_kept: int
    """Until a checkpoint allows to cut it."""
    store: int


def traffic_of(config: RunConfig, view: AgentView, found: Parameters, assumed: Assumptions) -> Traffic:
    """Of the policy of view.role and of all roles that act with it."""
    engine = view.owner.engine
    width = 2 if engine.weights_dtype == "bfloat16" else 4
    version = width * (found.trained if engine.adapter_only else found.total)
    least, most = _shares(view.owner.optimizer.lr) if width == 2 else (1.0, 1.0)
    rollouts = config.trainer.pool * config.trainer.group_size
    each = PER_TOKEN + (found.routed if view.owner.policy.routing_replay else 0)
    count = tokens = log = log_most = 0
    for role in config.roles_of(view.role):
        agent = config.agents[role]
        n = rollouts * agent.d_max
        mean = max(2, round(agent.max_length * assumed.mean_length))
        count += n
        tokens += n * mean
        log += n * (RECORD + mean * each)
        log_most += n * (RECORD + agent.max_length * each)
    return Traffic(
        version,
        (round(version * least), round(version * most)),
        count,
        tokens,
        log,
        log_most,
        log * config.trainer.checkpoint_every,
        count * ROW,
    )


def _shares(lr: float) -> tuple[float, float]:
    """Of the next higher rate that was measured; above all of them up to a whole version."""
    for measured, least, most in PATCHES:
        if lr <= measured * 1.001:
            return least, most
    return PATCHES[-1][1], 1.0
