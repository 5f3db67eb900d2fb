"""How the rewards of one role become advantages: one section a kind, with the settings that act in it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag

from mgrpo.config.settings import Options, Settings

_Eps = Annotated[float, Field(ge=0, le=1e30)]


class MGrpoAlgorithm(Settings):
    """The paper: rewards of the role's own trajectories, over mean and standard deviation of its group."""

    type: Literal["mgrpo"] = "mgrpo"
    eps: _Eps = 1e-6
    """Added to the standard deviation."""


class GrpoAlgorithm(Settings):
    """A team reward: every trajectory gets the group-relative advantage of its rollout's main reward."""

    type: Literal["grpo"] = "grpo"
    eps: _Eps = 1e-6
    """Added to the standard deviation."""


class DrGrpoAlgorithm(Settings):
    """As mgrpo without the standard deviation."""

    type: Literal["dr_grpo"] = "dr_grpo"


class RlooAlgorithm(Settings):
    """Reward less the mean of the group's other trajectories."""

    type: Literal["rloo"] = "rloo"


class BatchAlgorithm(Settings):
    """The group's mean, and the standard deviation of the role's whole minibatch."""

    type: Literal["batch"] = "batch"
    eps: _Eps = 1e-6
    """Added to the standard deviation."""


class TurnCreditAlgorithm(Settings):
    """As mgrpo, plus a comparison of the turns that answer the same observation. An advantage for each token."""

    type: Literal["turn_credit"] = "turn_credit"
    eps: _Eps = 1e-6
    """Added to the standard deviations."""
    gamma: float = Field(0.95, gt=0, le=1)
    """Discount of the reward for each turn that follows."""
    omega: float = Field(1.0, gt=0, le=1e6)
    """Weight of the comparison of turns."""


class LeaveOneOutCallAlgorithm(Settings):
    """Reward less the mean reward of all calls of the role in the group's other rollouts."""

    type: Literal["leave_one_out_call"] = "leave_one_out_call"


class PluginAlgorithm(Settings):
    """A class derived from mgrpo.algorithms.Algorithm, by the name that an installed package gives it, or by path."""

    type: str
    """E.g. "package.module:Class"."""
    options: Options = Field(default_factory=dict)
    """Its own settings, which it checks."""


def _kind(section: object) -> str:
    name = section.get("type", "mgrpo") if isinstance(section, dict) else getattr(section, "type", None)
    return f"({name})" if isinstance(name, str) and name in ALGORITHM_TYPES else "(plugin)"


AlgorithmConfig = Annotated[
    Annotated[MGrpoAlgorithm, Tag("(mgrpo)")]
    | Annotated[GrpoAlgorithm, Tag("(grpo)")]
    | Annotated[DrGrpoAlgorithm, Tag("(dr_grpo)")]
    | Annotated[RlooAlgorithm, Tag("(rloo)")]
    | Annotated[BatchAlgorithm, Tag("(batch)")]
    | Annotated[TurnCreditAlgorithm, Tag("(turn_credit)")]
    | Annotated[LeaveOneOutCallAlgorithm, Tag("(leave_one_out_call)")]
    | Annotated[PluginAlgorithm, Tag("(plugin)")],
    Discriminator(_kind),
]
"""`agents.<role>.algorithm`: the section of a built-in kind, else that of a class from outside."""

ALGORITHM_TYPES = frozenset(
    kind.model_fields["type"].default
    for kind in (get_args(tagged)[0] for tagged in get_args(get_args(AlgorithmConfig)[0]))
    if kind is not PluginAlgorithm
)
"""The names of the built-in kinds."""
