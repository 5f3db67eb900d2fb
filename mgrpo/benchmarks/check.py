"""What is wrong with a question set, and what is in it.

Nothing here quotes a question, so it may be shown of any set.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mgrpo.benchmarks.questions import rate_of, reader_of
from mgrpo.benchmarks.rows import read_rows
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError

YES_NO = {"yes", "no", "true", "false", "both", "neither"}  # answers that any question may hold
SHORTEST = 2  # characters of an answer that is looked for in its question


@dataclass(slots=True)
class Check:
    """errors: what keeps the file from being used. warnings: kind -> ids of the questions."""

    questions: list[Question] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def lengths(self) -> dict[str, tuple[int, float, int]]:
        """(shortest, median, longest) in characters of the questions and of their first answers."""
        found = {}
        for name, sizes in (
            ("question", [len(q.text) for q in self.questions]),
            ("answer", [len(q.answer) for q in self.questions]),
        ):
            if sizes:
                found[name] = (min(sizes), float(statistics.median(sizes)), max(sizes))
        return found

    def tags(self) -> dict[str, Counter[str]]:
        """Tag -> how many questions have each value; "" counts those without it."""
        names = sorted({tag for q in self.questions for tag in q.tags})
        return {name: Counter(q.tags.get(name, "") for q in self.questions) for name in names}

    def rated(self) -> int:
        """Questions with a pass rate."""
        return sum(rate_of(q) is not None for q in self.questions)


def check_questions(source: str, path: Path) -> Check:
    """Read the whole file, whatever is wrong with single rows. Raises ConfigError for an unknown source and for a file
    that cannot be read at all."""
    reader, check = reader_of(source), Check()
    try:
        for row in read_rows(path):
            try:
                check.questions.append(reader(row))
            except ConfigError as error:
                check.errors.append(str(error))
    except ConfigError as error:  # nothing behind it can be read
        if not check.questions:
            raise
        check.errors.append(str(error))
    if not check.questions and not check.errors:
        check.errors.append(f"{path}: holds no question")
    check.errors += [
        f"{path}: id {name!r} stands {n} times" for name, n in _twice([q.id for q in check.questions])
    ]
    _warn(check)
    return check


def _warn(check: Check) -> None:
    texts = [normal(q.text) for q in check.questions]
    repeated = {text for text, _ in _twice(texts)}
    found = {
        "the same text as another": [
            q.id for q, t in zip(check.questions, texts, strict=True) if t in repeated
        ],
        "an answer in the question": [q.id for q in check.questions if answer_inside(q)],
        "the same answer twice": [q.id for q in check.questions if len({*map(normal, q.gold)}) < len(q.gold)],
        "a file that is not there": [
            q.id for q in check.questions if not all(Path(a).is_file() for a in q.attachments)
        ],
    }
    check.warnings = {kind: ids for kind, ids in found.items() if ids}


def answer_inside(question: Question) -> bool:
    """Whether a gold answer stands in the question as a word or words of its own; yes, no and the like aside."""
    text = f" {normal(question.text)} "
    answers = [normal(answer) for answer in question.gold]
    return any(len(a) >= SHORTEST and a not in YES_NO and f" {a} " in text for a in answers)


def normal(text: str) -> str:
    """Words in lower case with one space between them, punctuation left out."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _twice(names: Sequence[str]) -> list[tuple[str, int]]:
    return [(name, n) for name, n in Counter(names).items() if n > 1]
