"""M-GRPO (arXiv 2511.13288): each role has its own rewards and its own groups.

    A = (R - mu) / (std + eps)

mu and std over the trajectories of the role in the K rollouts of a query, weighted by the alignment, so that a rollout
with many invocations counts no more than one with few.
"""

from mgrpo.algorithms.statistics import Float64, GroupRelative, Moments


class MGrpo(GroupRelative):
    def relative(self, moments: Moments) -> Float64:
        return moments.normalized(self.settings.eps)
