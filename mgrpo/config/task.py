"""[task]: which task a run plays, where its class is found, and how it changes while the run goes on."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from mgrpo.config.settings import Options, Settings


class StageConfig(Settings):
    """One stage of a curriculum: what differs from [task.options] and agents.<role>.reward while it lasts. The stages
    follow one another in the order of the file; a group belongs to a stage by its number alone, so that a resumed run,
    several workers and replay agree. Validation, heldout and every other evaluation are of the last stage."""

    name: str | None = None
    """What logs call it. Unset: its number, from 1."""
    until: int | None = Field(None, ge=1)
    """RL steps of the run after which the next stage begins: groups of the steps before belong to this one. Every stage
    but the last has one, higher than the stage's before."""
    options: Options = Field(default_factory=dict)
    """Laid over [task.options]: tables are merged key by key, everything else is replaced."""
    reward: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Laid over agents.<role>.reward, by role: { main = { format = 0.5 } } changes this part alone."""


class TaskConfig(Settings):
    """What the agents are asked."""

    name: str | None = None
    """A built-in task, one that an installed package gives, or "package.module:Class". With path unset too: "atlas"."""
    path: str | None = None
    """A class in a file that is not installed, e.g. "my_task.py:MyTask", relative to the config file."""
    options: Options = Field(default_factory=dict)
    """Settings of the task itself; each task checks its own."""
    stages: tuple[StageConfig, ...] = ()
    """A curriculum, each stage a table [[task.stages]]. Unset: the same task from the first step to the last."""

    @field_validator("stages", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @field_validator("stages")
    @classmethod
    def _stages_follow(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        names = [stage.name for stage in stages if stage.name is not None]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages are called {twice!r}")
        for number, stage in enumerate(stages[:-1]):
            if stage.until is None:
                raise ValueError(f"until of stage {number + 1} is missing: only the last stage has none")
        if stages and stages[-1].until is not None:
            raise ValueError(f"until={stages[-1].until} of the last stage: it lasts to the end of the run")
        ends = [stage.until or 0 for stage in stages[:-1]]
        for number, (end, after) in enumerate(itertools.pairwise(ends)):
            if after <= end:
                raise ValueError(
                    f"until={after} of stage {number + 2} must be higher than until={end} of the stage before"
                )
        return stages

    @model_validator(mode="before")
    @classmethod
    def _named(cls, tree: object) -> object:
        if isinstance(tree, dict) and tree.get("name") is None and tree.get("path") is None:
            return tree | {"name": "atlas"}
        return tree

    @model_validator(mode="after")
    def _one_place(self) -> TaskConfig:
        if self.path is not None:
            if self.name is not None:
                raise ValueError(f"name={self.name!r} and path={self.path!r} exclude each other")
            file, _, name = self.path.rpartition(":")
            if not (file.endswith(".py") and name.isidentifier()):
                raise ValueError(
                    f"path={self.path!r}, expected a file and its class, e.g. 'my_task.py:MyTask'"
                )
        return self

    @property
    def label(self) -> str:
        """What people call the task: its name, or file and class without the folder."""
        return self.name or Path(self.path or "").name

    @property
    def last_stage(self) -> int:
        """Number of the last stage; 0 without stages."""
        return max(0, len(self.stages) - 1)

    def stage_at(self, step: int) -> int:
        """Number, from 0, of the stage of RL step `step` (from 0); 0 without stages."""
        return bisect_right([stage.until or 0 for stage in self.stages[:-1]], step)

    def stage_name(self, stage: int) -> str:
        """What people call it."""
        return (self.stages[stage].name if self.stages else None) or str(stage + 1)

    def stage_options(self, stage: int) -> dict[str, Any]:
        """The options of the task in a stage."""
        return merged(self.options, self.stages[stage].options) if self.stages else dict(self.options)

    def with_options(self, options: Mapping[str, Any]) -> TaskConfig:
        """The same with other values of these options, in every stage."""
        return self.model_copy(
            update={
                "options": {**self.options, **options},
                "stages": tuple(
                    stage.model_copy(
                        update={"options": {k: v for k, v in stage.options.items() if k not in options}}
                    )
                    for stage in self.stages
                ),
            }
        )


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: where both have a table they are merged, elsewhere `above` wins. Both stay as they
    are."""
    both = {
        key: merged(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return {**below, **above, **both}
