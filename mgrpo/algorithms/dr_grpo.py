"""Dr. GRPO (arXiv 2503.20783) on the role's own groups: without the standard deviation, which favours questions that
are nearly always, or nearly never, answered right.

    A = R - mu
"""

from mgrpo.algorithms.statistics import Float64, GroupRelative, Moments


class DrGrpo(GroupRelative):
    def relative(self, moments: Moments) -> Float64:
        return moments.unscaled(moments.gap)
