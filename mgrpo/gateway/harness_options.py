"""[task.options] of a task whose agents are played by a program of the user's (mgrpo/gateway/harness.py)."""

from __future__ import annotations

from typing import TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from mgrpo.config.settings import MAX_SECONDS, Options, Settings, first_problem
from mgrpo.gateway.options import GatewayOptions
from mgrpo.services.config import variable_name

REPORTED = "reported"
"""The rule by which the harness itself says what its answer is worth."""


class HarnessScoring(Settings):
    """How answers are scored where the task's class has no score() of its own."""

    rule: str = "exact"
    """exact, gaia, f1, sub_exact, number, list, "package.module:function" (mgrpo/scoring), or "reported": the harness
    gives `correct` with its answer."""
    judge: Options | None = None
    """A model behind an OpenAI-compatible service judges what the rule does not accept: url, model, key_env, ..."""

    @model_validator(mode="after")
    def _one_judge(self) -> HarnessScoring:
        if self.rule == REPORTED and self.judge is not None:
            raise ValueError('judge has no effect beside rule = "reported"')
        return self


class HarnessOptions(Settings):
    """[task.options] of the task "harness" and of every class derived from HarnessTask."""

    questions: Options = Field(default_factory=dict)
    """Where questions come from: source, path, where, ... (mgrpo/benchmarks). Not for a class with questions of its
    own."""
    command: list[str] = Field(default_factory=list)
    """A program and its arguments, started for each rollout, e.g. ["python", "my_team.py"]."""
    folder: str | None = None
    """The command's working folder. Unset: the rollout worker's."""
    env: list[str] = Field(default_factory=list)
    """Names of further environment variables that the command gets; it has PATH, HOME and the like."""
    output_mb: float = Field(16.0, gt=0)
    """Most that a command may write, in MB; one that writes more is ended, and its rollout fails."""
    processes: int = Field(32, ge=1)
    """Commands of one rollout worker at the same time. Further rollouts wait, and their deadline with them."""
    remote: bool = False
    """Rollouts wait for a program elsewhere that claims them (`mgrpo gateway`)."""
    key_env: str | None = None
    """Name of the environment variable that holds the key of those programs. Needed where gateway.host is not
    loopback."""
    max_outage: float = Field(600.0, gt=0, le=MAX_SECONDS)
    """Seconds that rollouts wait, with nobody there to claim them, before the run ends."""
    alive_seconds: float = Field(60.0, gt=0, le=MAX_SECONDS)
    """Seconds after which a program that has claimed a rollout and gives no sign of life has lost it: it is played
    again."""
    scores: dict[str, list[str]] = Field(default_factory=dict)
    """Role -> names of the scores of its trajectories, which the harness posts or gives with its answer."""
    score: HarnessScoring = HarnessScoring()
    template: Options = Field(default_factory=dict)
    """Settings of the models' chat template, e.g. { enable_thinking = false }."""
    gateway: GatewayOptions = GatewayOptions()

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return name if name is None else variable_name(name)

    @field_validator("env")
    @classmethod
    def _names(cls, names: list[str]) -> list[str]:
        if not all(name.isidentifier() for name in names):
            raise ValueError("env: expected names of environment variables, not values")
        return names

    @model_validator(mode="after")
    def _one_way(self) -> HarnessOptions:
        if self.command and self.remote:
            raise ValueError(
                "command and remote exclude each other: `mgrpo gateway` starts the command elsewhere"
            )
        if self.command and not self.command[0]:
            raise ValueError("command begins with an empty text, expected a program")
        given = self.model_fields_set
        if not self.command and (idle := sorted(given & {"folder", "env", "output_mb", "processes"})):
            raise ValueError(f"{idle[0]} has no effect without command")
        if not self.remote and (idle := sorted(given & {"key_env", "max_outage", "alive_seconds"})):
            raise ValueError(f"{idle[0]} has no effect without remote")
        return self


O = TypeVar("O", bound=HarnessOptions)  # noqa: E741


def read_options(kind: type[O], options: object) -> O:
    """Raises ValueError naming the key."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ValueError(first_problem(error, "options")) from None
