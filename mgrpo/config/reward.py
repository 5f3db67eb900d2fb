"""[agents.<role>.reward]: what a trajectory of a role earns."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from mgrpo.config.settings import Settings

_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_METRICS = ("mean", "std", "gated")  # of a role's rewards, beside one of each score


class RewardConfig(Settings):
    """What a trajectory of this role earns: the gate times the weighted sum of its parts. Every field but `gate` is the
    weight of a part, a number >= 0. `correct` (main) and `outcome` (sub-agents) weigh the outcome of the rollout; every
    other name weighs the score of that name which the task gives the trajectory, e.g. format, expert, citation. A score
    that is known and not paid has weight 0. A name that the task does not score, and a score without a name here, are
    refused."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Weight] = Field(init=False)

    gate: bool = True
    """A trajectory whose format score is 0 earns exactly 0, whatever else is true (the paper's equations 4 and 5)."""

    @model_validator(mode="after")
    def _names_are_free(self) -> RewardConfig:
        for name in self.parts:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name of a score: expected letters, digits and _")
            if name in _METRICS:
                raise ValueError(f"{name} is a metric of the reward itself; give the score another name")
        return self

    @property
    def parts(self) -> dict[str, float]:
        """Name of each part -> its weight."""
        return dict(self.__pydantic_extra__ or {})
