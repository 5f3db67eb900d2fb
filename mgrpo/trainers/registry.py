"""The trainers by name. A new backend: a folder beside torch/ and a line here, or a class in a package of one's own."""

from __future__ import annotations

from pathlib import Path

from mgrpo.config import AgentView
from mgrpo.config.policy import EXTERNAL
from mgrpo.errors import ConfigError
from mgrpo.plugins import find_class
from mgrpo.trainers.base import PolicyTrainer

BUILT_IN = {"torch": "mgrpo.trainers.torch.trainer:TorchTrainer"}
GROUP = "mgrpo.trainers"


def find_trainer(view: AgentView) -> type[PolicyTrainer]:
    """The class that agents.<role>.policy.trainer names. Raises ConfigError for a name that is not known, and for
    "external", which is no class."""
    name, where = view.agent.policy.trainer, f"agents.{view.role}.policy.trainer"
    if name == EXTERNAL:
        raise ConfigError(
            f'{where} is "{EXTERNAL}": a program of yours trains it, through mgrpo.feed (docs/embedding/feed.md)'
        )
    return find_class(where, name, BUILT_IN, GROUP, PolicyTrainer)  # type: ignore[type-abstract]


def check_trainer(view: AgentView) -> None:
    """Raise ConfigError as find_trainer() does; what is built in is not imported, and torch with it."""
    if view.agent.policy.trainer not in (*BUILT_IN, EXTERNAL):
        find_trainer(view)


def open_trainer(view: AgentView, folder: Path) -> PolicyTrainer:
    """The trainer of the policy, on this rank. folder: the agent's, the same on all ranks (on several servers: a
    shared file system). Raises ConfigError as find_trainer()."""
    return find_trainer(view).open(view, folder)
