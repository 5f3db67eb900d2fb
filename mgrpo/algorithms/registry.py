"""The algorithms by name. A new one: a file here, a line below and its settings in mgrpo/config/algorithm.py; or a
class in a package of one's own, which needs neither."""

from __future__ import annotations

from mgrpo.algorithms.base import Algorithm
from mgrpo.config.algorithm import PluginAlgorithm
from mgrpo.config.run import RunConfig
from mgrpo.errors import ConfigError
from mgrpo.plugins import find_class

BUILT_IN = {
    "mgrpo": "mgrpo.algorithms.mgrpo:MGrpo",
    "grpo": "mgrpo.algorithms.grpo:Grpo",
    "dr_grpo": "mgrpo.algorithms.dr_grpo:DrGrpo",
    "rloo": "mgrpo.algorithms.rloo:Rloo",
    "batch": "mgrpo.algorithms.batch:Batch",
    "turn_credit": "mgrpo.algorithms.turn_credit:TurnCredit",
    "leave_one_out_call": "mgrpo.algorithms.leave_one_out_call:LeaveOneOutCall",
}
GROUP = "mgrpo.algorithms"


def open_algorithm(config: RunConfig, role: str, stage: int = 0) -> Algorithm:
    """The algorithm of `role`, with the reward of a stage of the curriculum. Raises ConfigError for a name that is
    not known, and for settings that it refuses."""
    section = config.agents[role].algorithm
    where = f"agents.{role}.algorithm"
    found = find_class(f"{where}.type", section.type, BUILT_IN, GROUP, Algorithm)  # type: ignore[type-abstract]
    settings = section.options if isinstance(section, PluginAlgorithm) else section
    try:
        return found(settings, role, config.stage_reward(role, stage))
    except KeyError as error:
        raise ConfigError(f"{where}.options: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}.options: {error}") from error
