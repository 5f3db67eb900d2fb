"""mgrpo: train teams of language models with M-GRPO.

Nothing heavy is imported here: public names are resolved on first use. Type checkers see the imports below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgrpo.alignment import Alignment, align
    from mgrpo.assignment import Assigned, assign
    from mgrpo.batcher import Batcher, Plan
    from mgrpo.config.loss import GrpoLossConfig
    from mgrpo.ops.group_advantage import group_advantage
    from mgrpo.ops.grpo_loss import grpo_loss
    from mgrpo.ops.linear_grpo_loss import linear_grpo_loss
    from mgrpo.ops.loss_metrics import join_metrics, step_metrics
    from mgrpo.ops.policy_loss import policy_loss
    from mgrpo.ops.selective_logprob import selective_logprob
    from mgrpo.ops.token_loss import loss_denominator
    from mgrpo.ops.token_values import TokenValues
    from mgrpo.run.external import feed
    from mgrpo.store.connect import connect
    from mgrpo.store.records import RunParams
    from mgrpo.types import Rollout, Trajectory

__version__ = "0.1.0"

_PUBLIC = {  # name -> module that defines it
    "Trajectory": "mgrpo.types",
    "Rollout": "mgrpo.types",
    "GrpoLossConfig": "mgrpo.config.loss",
    "group_advantage": "mgrpo.ops.group_advantage",
    "selective_logprob": "mgrpo.ops.selective_logprob",
    "grpo_loss": "mgrpo.ops.grpo_loss",
    "linear_grpo_loss": "mgrpo.ops.linear_grpo_loss",
    "policy_loss": "mgrpo.ops.policy_loss",
    "join_metrics": "mgrpo.ops.loss_metrics",
    "step_metrics": "mgrpo.ops.loss_metrics",
    "loss_denominator": "mgrpo.ops.token_loss",
    "TokenValues": "mgrpo.ops.token_values",
    "align": "mgrpo.alignment",
    "Alignment": "mgrpo.alignment",
    "assign": "mgrpo.assignment",
    "Assigned": "mgrpo.assignment",
    "Batcher": "mgrpo.batcher",
    "Plan": "mgrpo.batcher",
    "connect": "mgrpo.store.connect",
    "RunParams": "mgrpo.store.records",
    "feed": "mgrpo.run.external",
}

__all__ = [
    "Alignment",
    "Assigned",
    "Batcher",
    "GrpoLossConfig",
    "Plan",
    "Rollout",
    "RunParams",
    "TokenValues",
    "Trajectory",
    "__version__",
    "align",
    "assign",
    "connect",
    "feed",
    "group_advantage",
    "grpo_loss",
    "join_metrics",
    "linear_grpo_loss",
    "loss_denominator",
    "policy_loss",
    "selective_logprob",
    "step_metrics",
]


if not TYPE_CHECKING:  # a checker that saw this would take any name for an object

    def __getattr__(name: str) -> object:
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'mgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
