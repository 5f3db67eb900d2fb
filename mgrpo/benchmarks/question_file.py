"""A task's questions from local files: splits that never move, and an endless training stream that is a pure function.

    [task.options.questions]
    source = "jsonl"                     # or flashrag, webwalker, ...: mgrpo/benchmarks/readers.py
    path = "questions.jsonl"
    where = { hops = ["2", "3"] }        # tags
    pass_rate = [0.0, 0.5]               # the hard ones; rates = "rates.jsonl" where they lie in a file of their own
    fractions = { validation = 0.1, heldout = 0.1 }
    heldout = { source = "gaia", path = "2023/validation/metadata.parquet" }   # a split with a file of its own

Which split a question is in follows from a hash of its id alone, so it stays there when the file grows, is reordered or
filtered. The training stream goes through all questions, in another order each epoch; the order follows from the seed,
the epoch and the ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, ValidationError, model_validator

from mgrpo.benchmarks.question_set import QuestionSet, first_problem
from mgrpo.benchmarks.questions import order_key
from mgrpo.config.settings import Settings
from mgrpo.environments.task import Question, Split
from mgrpo.errors import ConfigError

SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")
KEPT_EPOCHS = 4  # orders that are kept: those around the present one


class Fractions(Settings):
    """How much of the file is set aside; the rest trains."""

    validation: float = Field(0.1, ge=0, lt=1)
    heldout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_trains(self) -> Fractions:
        if self.validation + self.heldout >= 1:
            raise ValueError(
                f"validation {self.validation:g} and heldout {self.heldout:g} leave nothing to train on"
            )
        return self


class QuestionFileConfig(QuestionSet):
    """A task's questions."""

    fractions: Fractions | None = None
    """Of the file, by a hash of the ids: default .1 and .1 for the splits without a file of their own."""
    validation: QuestionSet | None = None
    """A file of its own for this split; nothing of the first file is set aside for it then."""
    heldout: QuestionSet | None = None
    """The same."""

    @model_validator(mode="after")
    def _fractions_are_used(self) -> QuestionFileConfig:
        for split in ("validation", "heldout"):
            if (
                getattr(self, split) is not None
                and self.fractions
                and split in self.fractions.model_fields_set
            ):
                raise ValueError(f"fractions.{split} has no effect: {split} has a file of its own")
        return self


class QuestionFile:
    """A QuestionSource over local files. Reads them once, when it is made."""

    def __init__(self, config: QuestionFileConfig) -> None:
        """Raises ConfigError as read_questions(), and where no question is left to train on."""
        fractions = config.fractions or Fractions()
        own = {"validation": config.validation, "heldout": config.heldout}
        shares = {
            s: 0.0 if own[s] is not None else float(getattr(fractions, s)) for s in ("heldout", "validation")
        }
        self._path = config.path
        self._of: dict[Split, list[Question]] = {split: [] for split in SPLITS}
        for question in config.read():
            self._of[split_of(question.id, shares["validation"], shares["heldout"])].append(question)
        for split in SPLITS[1:]:
            if (given := own[split]) is not None:
                self._of[split] = given.read()
        if not self._of["train"]:
            raise ConfigError(f"{config.path}: all its questions are set aside, none is left to train on")
        self._train = {question.id: question for question in self._of["train"]}
        self._orders: dict[tuple[int, int], list[str]] = {}

    @classmethod
    def of(cls, options: object) -> QuestionFile:
        """From a table of a config. Raises ConfigError naming the key."""
        try:
            return cls(QuestionFileConfig.model_validate(options))
        except ValidationError as error:
            raise ConfigError(f"questions: {first_problem(error)}") from None

    def __len__(self) -> int:
        """Questions to train on."""
        return len(self._train)

    def question(self, index: int, seed: int) -> Question:
        """Number `index` of the endless stream of `seed`: each epoch has every training question once."""
        if index < 0:
            raise ValueError(f"index {index}: expected 0 or more")
        epoch, place = divmod(index, len(self._train))
        return self._train[self._order(seed, epoch)[place]]

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        """n questions of a split in an order that `seed` decides, or all of them where there are fewer. Raises
        ConfigError for a split without any."""
        if split not in self._of:
            raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
        if not self._of[split]:
            raise ConfigError(
                f"{self._path}: no question is in split {split!r}; set fractions.{split} higher, or give it a file of "
                "its own"
            )
        return sorted(self._of[split], key=lambda q: order_key("questions", seed, q.id))[:n]

    def question_set(self, split: Split) -> Sequence[Question]:
        """All questions of a split, in the order of the file."""
        return list(self._of[split])

    def _order(self, seed: int, epoch: int) -> list[str]:
        """The ids of an epoch. Kept, because computing it takes as long as a whole epoch of look-ups."""
        key = (seed, epoch)
        if key not in self._orders:
            while len(self._orders) >= KEPT_EPOCHS:
                self._orders.pop(next(iter(self._orders)), None)
            self._orders[key] = sorted(
                self._train, key=lambda name: (order_key("train", seed, epoch, name), name)
            )
        return self._orders[key]


def split_of(name: str, validation: float, heldout: float) -> Split:
    """The split of the question with this id. Heldout is taken from below and validation from above, so that a change
    of one fraction moves no question of the other."""
    place = order_key("split", name) / 2.0**64
    if place < heldout:
        return "heldout"
    return "validation" if place >= 1.0 - validation else "train"
