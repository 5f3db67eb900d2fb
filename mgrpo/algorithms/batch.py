"""REINFORCE++ with a group baseline (arXiv 2501.03262): the mean is the group's, the standard deviation that of all the
role's trajectories in one optimizer step.

    A = (R - mu) / (std of the batch + eps)
"""

import numpy as np

from mgrpo.algorithms.statistics import Float64, GroupRelative, Moments


class Batch(GroupRelative):
    def relative(self, moments: Moments) -> Float64:
        whole = Moments(moments.rewards, moments.weights, np.zeros_like(moments.group), 1, moments.unbiased)
        exponent = moments.exponent[moments.group] - whole.exponent
        gap: Float64 = np.ldexp(moments.gap, exponent)
        return gap / (whole.deviation + whole.scaled(self.settings.eps))
