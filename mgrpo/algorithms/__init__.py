"""Algorithms: from the rollout groups of a step to the advantage of each trajectory, or of each token."""

from mgrpo.algorithms.base import Algorithm, GroupMember, GroupRollout, RolloutGroup
from mgrpo.algorithms.registry import open_algorithm

__all__ = ["Algorithm", "GroupMember", "GroupRollout", "RolloutGroup", "open_algorithm"]
