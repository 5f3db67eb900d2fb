"""RLOO (arXiv 2402.14740) on the role's own groups: the baseline is the weighted mean of the other trajectories.

    A = R - (sum of the others' w R) / (sum of the others' w) = (R - mu) W / (W - w)

All copies of a trajectory leave together, or a copy would be its own baseline. W is the group's sum of weights.
"""

from mgrpo.algorithms.statistics import Float64, GroupRelative, Moments


class Rloo(GroupRelative):
    def relative(self, moments: Moments) -> Float64:
        total = moments.total[moments.group]
        return moments.unscaled(moments.gap * (total / (total - moments.weights)))
