"""mgrpo: train teams of language models with M-GRPO.

Nothing heavy is imported here: public names are resolved on first use.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {  # name -> module that defines it
    "Trajectory": "mgrpo.types",
    "Rollout": "mgrpo.types",
    "GrpoLossConfig": "mgrpo.config.loss",
    "group_advantage": "mgrpo.ops.group_advantage",
    "selective_logprob": "mgrpo.ops.selective_logprob",
    "grpo_loss": "mgrpo.ops.grpo_loss",
    "linear_grpo_loss": "mgrpo.ops.linear_grpo_loss",
    "loss_denominator": "mgrpo.ops.token_loss",
    "align": "mgrpo.alignment",
    "Alignment": "mgrpo.alignment",
    "Batcher": "mgrpo.batcher",
    "Plan": "mgrpo.batcher",
    "connect": "mgrpo.store.client",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
