"""Which questions of which local file: the options of a question set, as configs and callers give them.

read_questions("gaia", Path("2023/validation/metadata.parquet"), where={"level": ["1", "2"], "files": ["0"]})
read_questions("jsonl", Path("hard.jsonl"), pass_rate=[0.0, 0.5])
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from mgrpo.benchmarks.questions import check_attachments, choose, read_all
from mgrpo.config.settings import Settings
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError


class QuestionSet(Settings):
    """Which questions of which file."""

    source: str = "jsonl"
    """How the file is read: jsonl, gaia, xbench, browsecomp, webwalker, flashrag, simpleqa or frames."""
    path: str
    """A local file."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Tag -> the values that are wanted, e.g. { level = ["1", "2"] }; several tags must all fit."""
    pass_rate: list[float] | None = Field(None, min_length=2, max_length=2)
    """Lowest and highest pass rate that is wanted, e.g. [0.0, 0.5]; questions without one are left out."""
    rates: str | None = None
    """The file of `mgrpo filter` with the pass rates. Unset: they stand in the file itself."""
    limit: int | None = Field(None, ge=1)
    """Only so many, chosen by a hash of their ids."""
    attachments: bool = True
    """Whether the files that belong to a question must be there."""

    @model_validator(mode="after")
    def _rates_are_used(self) -> QuestionSet:
        if self.rates is not None and self.pass_rate is None:
            raise ValueError(f"rates={self.rates!r} has no effect without pass_rate")
        return self

    def read(self) -> list[Question]:
        """The questions, in the order of the file. Raises ConfigError as read_questions()."""
        bounds = None if self.pass_rate is None else (self.pass_rate[0], self.pass_rate[1])
        rates = None if self.rates is None else Path(self.rates)
        found = choose(
            read_all(self.source, Path(self.path)), Path(self.path), self.where, bounds, rates, self.limit
        )
        if self.attachments:
            check_attachments(found, Path(self.path))
        return found


def read_questions(source: str, path: Path, **options: object) -> list[Question]:
    """The questions of a local file, in its order. options: the other fields of QuestionSet.

    Raises ConfigError naming file, line and column of what cannot be read or stands twice, an option that is unknown or
    of the wrong type, a tag or value that no question has, bounds that are none, and a file of which nothing is left.
    """
    plain = {
        n: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
        for n, v in options.items()
    }
    try:
        chosen = QuestionSet.model_validate({"source": source, "path": str(path), **plain})
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_problem(error)}") from None
    return chosen.read()


def first_problem(error: ValidationError) -> str:
    """The key and what is wrong with it."""
    first = error.errors()[0]
    name, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{name}: {message}" if name else message
