"""[task]: which task a run plays, and where its class is found."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from mgrpo.config.settings import Options, Settings


class TaskConfig(Settings):
    """What the agents are asked."""

    name: str | None = None
    """A built-in task, one that an installed package gives, or "package.module:Class". With path unset too: "atlas"."""
    path: str | None = None
    """A class in a file that is not installed, e.g. "my_task.py:MyTask", relative to the config file."""
    options: Options = Field(default_factory=dict)
    """Settings of the task itself; each task checks its own."""

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
