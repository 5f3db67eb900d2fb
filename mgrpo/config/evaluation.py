"""[eval]: when accuracy is measured, on which questions."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from mgrpo.config.settings import Options, Settings

OWN = "task"  # as a set's source: the task gives its questions
_SPLITS = ("train", "validation", "heldout")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class EvalSetConfig(Settings):
    """A named evaluation set, beside the task's own validation and heldout splits. It is played before RL, every
    `every` steps and at the end, by the policies of that step; nothing is trained on it. Its metrics are
    eval/<name>/avg, stderr and failed, and eval/<name>/<tag>-<value>/avg of each tag of its questions."""

    name: str
    """What metrics, records and pages call it; with source "task" the task's own name of the set."""
    source: str
    """Form of its file: "gaia", "xbench", "browsecomp", "webwalker", "flashrag", "simpleqa", "frames" or "jsonl"
    (docs/benchmarks.md); or "task": a set that the task itself offers."""
    path: str | None = None
    """Its file or folder, relative to the config file. Nothing is fetched."""
    options: Options = Field(default_factory=dict)
    """Settings of the reader, e.g. { where = { level = ["1", "2"] } }."""
    n: int | None = Field(None, ge=1)
    """Its first n questions. Unset: all."""
    every: int = Field(25, ge=1)
    """Steps between two plays."""
    repeats: int = Field(1, ge=1)
    """Sampled rollouts of each question: avg is their mean."""
    greedy: bool = False
    """Play one greedy rollout of each question instead."""

    @field_validator("name")
    @classmethod
    def _name_fits_a_metric(cls, name: str) -> str:
        if not _NAME.fullmatch(name) or name in _SPLITS:
            raise ValueError(f"{name!r}: expected letters, digits, '_', '-' and '.', and none of {_SPLITS}")
        return name

    @model_validator(mode="after")
    def _one_place(self) -> EvalSetConfig:
        if self.source == OWN and (self.path is not None or self.options):
            given = "path" if self.path is not None else "options"
            raise ValueError(f'{given} has no effect on set {self.name!r} with source = "{OWN}"')
        if self.source != OWN and self.path is None:
            raise ValueError(f"path of set {self.name!r} is missing: source {self.source!r} reads a file")
        if self.greedy and self.repeats > 1:
            raise ValueError(
                f"repeats={self.repeats} has no effect on set {self.name!r} with greedy = true: every rollout of a "
                "question would be the same"
            )
        return self


class EvalConfig(Settings):
    """Accuracy on questions that are never trained on."""

    renamed: ClassVar = {"gate": "start_validation"}

    every: int = Field(25, ge=1)
    """Steps between evaluations on the validation split."""
    validation: int = Field(120, ge=1)
    """Questions of one evaluation on the validation split."""
    heldout: int = Field(400, ge=1)
    """Questions of the held-out evaluations: at the start and at the end."""
    start_validation: int = Field(200, ge=0)
    """Questions that validate the policies before RL; 0 skips the validation, and the run counts as not valid."""
    sets: tuple[EvalSetConfig, ...] = ()
    """Named evaluation sets, each a table [[eval.sets]]."""

    @field_validator("sets", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @field_validator("sets")
    @classmethod
    def _names_differ(cls, sets: tuple[EvalSetConfig, ...]) -> tuple[EvalSetConfig, ...]:
        names = [s.name for s in sets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two sets are called {twice!r}")
        return sets
