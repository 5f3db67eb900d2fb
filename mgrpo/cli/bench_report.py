"""The report of a question set: one JSON object for machines, one table for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mgrpo.benchmarks.statistics import QuestionScores, SetScores, by_tag, score_set
from mgrpo.cli.repeats import Journal, Line, Repeats
from mgrpo.environments.task import Question
from mgrpo.run.text import clean

MOST_VALUES = 20  # of a tag in the table; the report has all


def bench_report(name: str, header: Mapping[str, object], what: Repeats, journal: Journal) -> dict[str, Any]:
    """Everything that the rollouts of a set say. header: what was played. Of a redacted set it holds ids, tags and
    numbers; else the questions, their gold answers and the agents' answers too."""
    scores = journal.scores(what.questions, what.repeats)
    lines = [
        line
        for q in what.questions
        for r in range(what.repeats)
        if (line := journal.lines.get((q.id, r))) is not None
    ]
    return {
        "name": name,
        **header,
        "secret": any(q.secret for q in what.questions),
        **_figures(score_set(scores, what.repeats)),
        "tags": {
            tag: {value: _figures(found) for value, found in values.items()}
            for tag, values in by_tag(scores, what.repeats).items()
        },
        "scored_by": sorted({line.digest for line in lines if line.digest}),
        "block_list_hits": sum(line.blocked for line in lines),
        "tool_calls": _sum([line.tools for line in lines]),
        "tokens": _means([line.tokens for line in lines if line.correct is not None]),
        "invocations": _means([line.calls for line in lines if line.correct is not None]),
        "seconds": _plain(_mean([line.seconds for line in lines if line.correct is not None])),
        "per_question": [_question(q, s, what, journal) for q, s in zip(what.questions, scores, strict=True)],
    }


def _figures(found: SetScores) -> dict[str, Any]:
    return {
        "n_questions": found.questions,
        "n_scored": found.scored,
        "avg": _plain(found.mean),
        "stderr": _plain(found.stderr),
        "pass": {str(k): {"value": _plain(p), "n_questions": n} for k, (p, n) in found.pass_at.items()},
        "by_repeat": [_plain(x) for x in found.by_repeat],
        "played": found.played,
        "failed": dict(found.failed),
    }


def _question(question: Question, scores: QuestionScores, what: Repeats, journal: Journal) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": question.id,
        "tags": dict(question.tags),
        "scores": [scores.scores.get(r) for r in range(what.repeats)],
    }
    if scores.failed:
        found["failed"] = {str(r): kind for r, kind in sorted(scores.failed.items())}
    if not (what.redact or question.secret):
        lines = [journal.lines.get((question.id, r), Line(question.id, r)) for r in range(what.repeats)]
        found |= {
            "question": question.text,
            "gold": list(question.gold),
            "answers": [line.answer for line in lines],
        }
    return found


def table_of(report: Mapping[str, Any]) -> Table:
    """A row for the set, and one for each value of each tag."""
    n = len(report["by_repeat"])
    marks = [
        mark for mark, there in (("secret", report["secret"]), ("redacted", report["redacted"])) if there
    ]
    title = f"{clean(report['name'])} ({clean(str(report['set']))}{''.join(f', {mark}' for mark in marks)})"
    table = Table(title=Text(title), title_justify="left")
    for heading in ("", "questions", f"avg@{n}", "± s.e.", f"pass@{n}", "failed rollouts"):
        table.add_column(heading, justify="left" if heading in ("", "failed rollouts") else "right")
    table.add_row("all", *_cells(report, n))
    for tag, values in report["tags"].items():
        table.add_section()
        for value in list(values)[:MOST_VALUES]:
            table.add_row(Text(clean(f"{tag} {value}")), *_cells(values[value], n))
        if len(values) > MOST_VALUES:
            table.add_row(Text(clean(f"{tag}: {len(values) - MOST_VALUES} more")))
    by_repeat = ", ".join(_number(x) for x in report["by_repeat"])
    words = [f"each repeat alone: {by_repeat}", f"block-list hits: {report['block_list_hits']}"]
    if digests := {**report.get("digests", {})}:
        words.append(", ".join(f"{name} {digest}" for name, digest in digests.items()))
    table.caption = Text(clean("\n".join(words)))
    table.caption_justify = "left"
    return table


def _cells(figures: Mapping[str, Any], n: int) -> list[str]:
    scored, questions = figures["n_scored"], figures["n_questions"]
    passed = figures["pass"][str(n)]
    over = "" if passed["n_questions"] == questions else f" (of {passed['n_questions']})"
    return [
        str(questions) if scored == questions else f"{scored} of {questions}",
        _number(figures["avg"]),
        _number(figures["stderr"]),
        _number(passed["value"]) + over,
        ", ".join(f"{count} {kind}" for kind, count in figures["failed"].items()) or "0",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _sum(tables: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(sorted(total.items()))


def _means(tables: Sequence[Mapping[str, int]]) -> dict[str, float]:
    return {name: total / len(tables) for name, total in _sum(tables).items()}
