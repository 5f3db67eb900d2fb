"""A policy of a test on several ranks, by the way that every policy takes there: over its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mgrpo.model.loading import blank_policy
from mgrpo.model.policy import Policy, save_policy
from mgrpo.trainers.torch.ranks import Ranks
from mgrpo.trainers.torch.shard import ShardedPolicy


def sharded(policy: Policy, folder: Path, ranks: Ranks) -> ShardedPolicy:
    """A collective. folder: a new one for each call. The tokenizer stays the policy's: a loaded one may have more
    tokens."""
    if ranks.is_main:
        save_policy(policy, folder)
    ranks.gather(None)
    blank = replace(blank_policy(folder, policy.config), tokenizer=policy.tokenizer)
    return ShardedPolicy(blank, ranks)
