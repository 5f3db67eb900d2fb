"""Question sets as lists: read from a local file, chosen by tags and pass rates, written back as jsonl.

Questions of an encrypted set exist in memory only: write_questions() refuses them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mgrpo.benchmarks.readers import SOURCES, Reader, content_id, pass_rate
from mgrpo.benchmarks.rows import read_rows
from mgrpo.environments.task import Question
from mgrpo.errors import ConfigError
from mgrpo.files import write_atomic

Where = Mapping[str, Sequence[str]]
"""Tag -> the values that are wanted; several tags must all fit."""
Bounds = tuple[float, float]


def read_all(source: str, path: Path) -> list[Question]:
    """Every question of a local file. Raises ConfigError naming file, line and column."""
    reader = reader_of(source)
    questions = [reader(row) for row in read_rows(path)]
    check_ids(questions, path)
    if not questions:
        raise ConfigError(f"{path}: holds no question")
    return questions


def choose(
    questions: list[Question],
    path: Path,
    where: Where,
    bounds: Bounds | None,
    rates: Path | None,
    limit: int | None,
) -> list[Question]:
    """Those with these tags and a pass rate within these bounds, and of them the first `limit` by a hash of their ids.
    rates: a file of `mgrpo filter`; None: pass rates stand in the file at `path`. Raises ConfigError where none is
    left, saying what there is."""
    found = [q for q in questions if _has_tags(q, where)] if where else questions
    if not found:
        raise ConfigError(f"{path}: no question with {_shown(where)}; {_tags_there(questions, where)}")
    if rates is not None:
        found = with_rates(found, rates)
    if bounds is not None:
        found = _within(found, bounds, rates or path)
    if limit is not None:
        chosen = {q.id for q in sorted(found, key=lambda q: order_key("limit", q.id))[:limit]}
        found = [q for q in found if q.id in chosen]
    return found


def reader_of(source: str) -> Reader:
    """Raises ConfigError naming the sources that there are."""
    if source not in SOURCES:
        raise ConfigError(f"source {source!r} is unknown, expected one of {', '.join(SOURCES)}")
    return SOURCES[source]


def check_ids(questions: Sequence[Question], path: Path) -> None:
    """Raise ConfigError where an id stands twice: results and pass rates are kept by it."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ConfigError(f"{path}: id {question.id!r} stands twice")
        seen.add(question.id)


def order_key(*parts: object) -> int:
    """A 64-bit number that parts decide, for orders and splits that depend on no other question."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def digest_of(questions: Sequence[Question]) -> str:
    """16 hexadecimal digits, equal exactly for sets of the same questions and answers, in any order. It tells nothing
    of a secret set."""
    rows = sorted(json.dumps([q.id, q.text, list(q.gold)]) for q in questions)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """A file that read_questions("jsonl", path) reads back. Raises ConfigError for a secret question, of which nothing
    may lie on a disk, for an id that stands twice and for what JSON cannot hold."""
    lines = []
    for question in questions:
        if question.secret:
            raise ConfigError(
                f"{path}: question {question.id!r} is of a set that must not be published; it is not written"
            )
        lines.append(_line(question, path))
    check_ids([_named(q) for q in questions], path)
    try:
        write_atomic(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _named(question: Question) -> Question:
    return question if question.id else replace(question, id=content_id(question.text, *question.gold))


def _line(question: Question, path: Path) -> str:
    info = dict(question.info)
    rate = info.pop("pass_rate", None)
    fields: dict[str, object] = {"id": _named(question).id, "question": question.text}
    fields |= {"answers": list(question.answers)} if question.answers else {"answer": question.answer}
    fields |= {"tags": dict(question.tags)} if question.tags else {}
    fields |= (
        {"attachments": [str(Path(a).absolute()) for a in question.attachments]}
        if question.attachments
        else {}
    )
    fields |= {"info": info} if info else {}
    fields |= {} if rate is None else {"pass_rate": rate}
    try:
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        line.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: question {fields['id']!r} cannot be written: {error}") from None
    return line


def with_rates(questions: Sequence[Question], rates: Path) -> list[Question]:
    """Questions with the pass rates that a file of `mgrpo filter` gives them; one that it does not name has none."""
    known: dict[str, float] = {}
    for row in read_rows(rates):
        if (rate := row.value("pass_rate")) is not None:
            known[row.text("id")] = pass_rate(rate, row.place("pass_rate"))
    if not known:
        raise ConfigError(f"{rates}: has no pass rate; expected a file of mgrpo filter")
    return [replace(q, info={**q.info, "pass_rate": known[q.id]}) if q.id in known else q for q in questions]


def rate_of(question: Question) -> float | None:
    """Its pass rate; None where it has none."""
    rate = question.info.get("pass_rate")
    return rate if isinstance(rate, float) else None


def _within(questions: Sequence[Question], bounds: Bounds, path: Path) -> list[Question]:
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high <= 1):
        raise ConfigError(f"pass_rate {low:g} to {high:g}: expected 0 <= low <= high <= 1")
    rated = [(q, rate) for q in questions if (rate := rate_of(q)) is not None]
    if not rated:
        raise ConfigError(f"{path}: has no pass rates; mgrpo filter measures them")
    found = [q for q, rate in rated if low <= rate <= high]
    if not found:
        rates = [rate for _, rate in rated]
        raise ConfigError(
            f"{path}: no question has a pass rate of {low:g} to {high:g}; they go from {min(rates):g} to {max(rates):g}"
        )
    return found


def _has_tags(question: Question, where: Where) -> bool:
    return all(question.tags.get(tag) in values for tag, values in where.items())


def _shown(where: Where) -> str:
    return ", ".join(f"{tag} = {' or '.join(values)}" for tag, values in where.items())


def _tags_there(questions: Sequence[Question], where: Where) -> str:
    """What the tags of `where` are in the set, for errors: they are no secret."""
    words = []
    for tag in where:
        values = sorted({q.tags[tag] for q in questions if tag in q.tags})
        more = f" and {len(values) - 12} more" if len(values) > 12 else ""
        words.append(
            f"{tag} is {', '.join(values[:12])}{more}" if values else f"no question has the tag {tag}"
        )
    return "; ".join(words)


def check_attachments(questions: Sequence[Question], path: Path) -> None:
    """Raise ConfigError for a question whose files are not there."""
    missing = [(q.id, a) for q in questions for a in q.attachments if not Path(a).is_file()]
    if missing:
        name, file = missing[0]
        raise ConfigError(
            f"{path}: question {name!r} needs the file {file}, which is not there ({len(missing)} are missing); bring "
            'them, or choose questions without files, e.g. where = { files = ["0"] }'
        )
