"""verl's own config objects, teams of rows, and the loss that mgrpo computes of them with votes as weights."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import Tensor
from verl import DataProto
from verl.utils.config import omega_conf_to_dataclass

import mgrpo
from mgrpo.integrations import verl as adapter

D_MAX = 2
ROLES = ("main", "sub", "searcher")


@functools.cache
def compose_config(*overrides: str) -> DictConfig:
    """verl's PPO config as its command line composes it."""
    base = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "actor_rollout_ref.rollout.n=4"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", [*base, *overrides])


def mgrpo_config(*overrides: str) -> DictConfig:
    """The same with mgrpo's estimator and policy loss."""
    return compose_config(
        "algorithm.adv_estimator=mgrpo",
        f"+algorithm.mgrpo.d_max={D_MAX}",
        "+algorithm.mgrpo.seed=7",
        "actor_rollout_ref.actor.policy_loss.loss_mode=mgrpo",
        *overrides,
    )


def actor_of(config: DictConfig, **whole: Any) -> Any:
    """The dataclass that verl's workers hand to a policy loss; whole: what they know of the mini-batch."""
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info.update(whole)
    return actor


@dataclass(frozen=True)
class Team:
    """B rows of a step, of S tokens; the columns of mgrpo.assign and the tensors of verl's batch."""

    query: list[str]
    role: list[str]
    rollout: list[int]
    invocation: list[int]
    reward: Tensor  # (B,)
    mask: Tensor  # int64 (B, S)
    logprobs: Tensor  # float32 (B, S), of the policy that is trained
    old_logprobs: Tensor  # float32 (B, S)

    @property
    def uids(self) -> np.ndarray:
        rows = zip(self.query, self.role, self.rollout, self.invocation, strict=True)
        return np.array([adapter.row_name(*row) for row in rows], dtype=object)

    @property
    def token_rewards(self) -> Tensor:
        """(B, S), the reward at the last place, as verl's agent loop writes it."""
        out = torch.zeros(self.mask.shape)
        out[:, -1] = self.reward
        return out

    def assign(self, **arguments: Any) -> mgrpo.Assigned:
        """What mgrpo.assign makes of the rows."""
        step = zlib.crc32("\n".join(sorted(set(self.query))).encode())
        columns = (self.query, self.role, self.rollout, self.invocation, self.reward.double().numpy())
        tokens = self.mask.sum(-1).numpy()
        return mgrpo.assign(*columns, tokens=tokens, d_max=D_MAX, seed=7, step=step, **arguments)


def make_team(seed: int, queries: int = 3, rollouts: int = 4, width: int = 9) -> Team:
    """Rollouts with 0 to 4 invocations of each sub-agent, in random order, with gaps in the masks."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in range(queries):
        for rollout in range(rollouts):
            rows += [(f"q{query}/x", "main", rollout, 0)]
            for role in ROLES[1:]:
                rows += [(f"q{query}/x", role, rollout, at) for at in range(rng.integers(0, 5))]
    rows = [rows[at] for at in rng.permutation(len(rows))]
    size = (len(rows), width)
    mask = torch.from_numpy((rng.random(size) < 0.7).astype(np.int64))
    mask[:, 0] = 1
    old = torch.from_numpy(rng.uniform(-4.0, -0.1, size)).float()
    query, role, rollout, invocation = map(list, zip(*rows, strict=True))
    reward = torch.from_numpy(rng.normal(size=len(rows))).float()
    return Team(
        query,
        role,
        rollout,
        invocation,
        reward,
        mask,
        old + torch.from_numpy(rng.normal(0, 0.4, size)).float(),
        old,
    )


def batch_of(team: Team, uids: np.ndarray | None = None) -> DataProto:
    tensors = {"token_level_rewards": team.token_rewards, "response_mask": team.mask}
    return DataProto.from_dict(tensors, non_tensors={"uid": team.uids if uids is None else uids})


def padded(team: Team, rows: int) -> tuple[Team, np.ndarray]:
    """The team with verl's rows of padding behind it, and its uids."""
    more = torch.zeros(rows, team.mask.shape[1], dtype=torch.int64)
    mask = torch.cat([team.mask, more])
    reward = torch.cat([team.reward, torch.zeros(rows)])
    uids = np.array([*team.uids, *["pad" + "0" * 32] * rows], dtype=object)
    return replace(team, mask=mask, reward=reward), uids


LOSS_TYPES = {
    "token-mean": {"type": "dapo"},
    "seq-mean-token-mean": {"type": "grpo"},
    "seq-mean-token-sum": {"type": "dr_grpo", "max_completion_length": 1},
    "seq-mean-token-sum-norm": {"type": "dr_grpo", "max_completion_length": 32},
}
"""verl's loss_agg_mode -> the loss of mgrpo that divides as it does (loss_scale_factor 32)."""


def weighted_loss(team: Team, mode: str, delta: float | None = 3.0, **settings: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient (B, S)) of mgrpo.policy_loss with the votes as weights, on packed rows."""
    assigned = team.assign()
    logprobs = team.logprobs.clone().requires_grad_()
    width = team.mask.shape[1]
    loss, _ = mgrpo.policy_loss(
        logprobs.flatten(),
        config=mgrpo.GrpoLossConfig(**LOSS_TYPES[mode], delta=delta, **settings),
        cu_seqlens=torch.arange(0, team.mask.numel() + 1, width, dtype=torch.int32),
        advantages=torch.from_numpy(assigned.advantage).float(),
        seq_weight=torch.from_numpy(assigned.weight).float(),
        loss_mask=team.mask.flatten(),
        old_logprobs=team.old_logprobs.flatten(),
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad
