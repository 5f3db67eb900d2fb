"""M-GRPO with TRL 1.16: `MGRPOTrainer` inside TRL's own loop, `AgentTrainer` as the trainer of one agent of a run, and
`add_grpo_head` for a loop of one's own. TRL is imported when one of the trainers is used. What a user types, and which
settings are refused, is in docs/embedding/trl.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mgrpo.errors import ConfigError
from mgrpo.integrations.trl_head import add_grpo_head

if TYPE_CHECKING:
    from mgrpo.integrations.trl_agent import AgentTrainer
    from mgrpo.integrations.trl_trainer import MGRPOTrainer

__all__ = ["AgentTrainer", "MGRPOTrainer", "add_grpo_head"]

_LAZY = {
    "MGRPOTrainer": "mgrpo.integrations.trl_trainer",
    "AgentTrainer": "mgrpo.integrations.trl_agent",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            if error.name in ("trl", "accelerate", "datasets", "transformers"):
                raise ConfigError(
                    f"{name} needs {error.name}: pip install 'mgrpo[trl]' installs TRL 1.16 and what it takes"
                ) from error
            raise
