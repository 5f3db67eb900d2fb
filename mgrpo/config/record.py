"""What a run keeps of itself, and where its metrics go."""

from __future__ import annotations

from pydantic import Field, field_validator

from mgrpo.config.settings import Settings


class RecordConfig(Settings):
    """What a run keeps of its rollouts and of the credit they earned, for the run page and for replay."""

    enabled: bool = True
    """false: nothing is recorded, and the run page and replay have nothing to show."""
    tokens_every: int = Field(1, ge=0)
    """Token ids, masks and log-probs are kept of every n-th step (1: of all, 0: of none); rewards, advantages and
    alignment of every step. Replaying a loss needs the tokens of all steps since the last kept checkpoint."""
    evaluation: int = Field(40, ge=0)
    """Rollouts kept of each evaluation."""
    spans: bool = True
    """When each rollout, turn, tool call, claim, step and weight update began and ended, for `mgrpo trace` and the run
    page's timeline."""
    max_mb: float = Field(256.0, gt=0)
    """Bound on the records of one process in 10^6 bytes, and on its spans. The oldest go first, but never those of the
    run's start."""
    checkpoints_mb: float = Field(256.0, ge=0)
    """Bound on one agent's checkpoints that are kept for replay (hard links; the oldest go first; 0: none)."""


class MetricsConfig(Settings):
    """Where the metrics of a run go beside metrics.jsonl, which is always written."""

    sinks: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb, mlflow or trackio (where the library is installed), the name that an installed package gives
    one, or "package.module:Class". Accounts and servers are set as each library wants it, mostly by environment
    variables. A sink that fails is reported, and the run goes on without it."""
    project: str = "mgrpo"
    """What wandb and trackio call the project, and mlflow the experiment."""
    name: str | None = None
    """Name of the run in them. Unset: that of its folder."""

    _tuples = field_validator("sinks", mode="before")(lambda v: tuple(v) if isinstance(v, list) else v)
