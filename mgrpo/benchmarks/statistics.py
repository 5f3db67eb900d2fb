"""What n repeats of a question set say of a team: avg@n with its standard error, and pass@n.

    avg@n   the mean over questions of the mean over their repeats
    stderr  sqrt(variance of the questions' means / number of questions): over questions, repeats within. A question's
            mean already carries the noise of its repeats, so both sources of error are in it
    pass@k  the chance that one of k repeats is right, over all choices of k among a question's n: 1 - C(n - c, k) /
            C(n, k) with c right ones (Chen et al. 2021, arXiv 2107.03374, equation 1), which is unbiased

Rollouts that failed (an engine, tool or judge that did not answer) are in none of them and are counted beside. A
question without any rollout left is in no mean; pass@k is over the questions of which k rollouts were played.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RIGHT = 0.5
"""A rollout counts as right for pass@k from this outcome on; outcomes of 0 and 1 need no such bound."""


@dataclass(slots=True)
class QuestionScores:
    """One question's outcomes, each in [0, 1], and what became of the rollouts without one."""

    id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    """Number of the repeat -> outcome."""
    failed: dict[int, str] = field(default_factory=dict)
    """Number of the repeat -> kind of its failure."""

    @property
    def mean(self) -> float:
        """Pass rate. NaN where no rollout was played."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else math.nan

    @property
    def right(self) -> int:
        return sum(score >= RIGHT for score in self.scores.values())


@dataclass(frozen=True, slots=True)
class SetScores:
    """Of a set, or of the questions with one tag."""

    questions: int
    """All of them, also those without a rollout."""
    scored: int
    """Those with at least one."""
    mean: float
    """avg@n."""
    stderr: float
    """NaN below two questions."""
    pass_at: Mapping[int, tuple[float, int]]
    """k -> pass@k and the number of questions that it is over."""
    by_repeat: tuple[float, ...]
    """The mean over questions of each repeat alone."""
    played: int
    failed: Mapping[str, int]
    """Kind of failure -> rollouts."""


def score_set(questions: Sequence[QuestionScores], repeats: int) -> SetScores:
    """The figures of `repeats` rollouts of each question."""
    means = [q.mean for q in questions if q.scores]
    pass_at = {}
    for k in range(1, repeats + 1):
        chances = [pass_at_k(len(q.scores), q.right, k) for q in questions if len(q.scores) >= k]
        pass_at[k] = (_mean(chances), len(chances))
    return SetScores(
        questions=len(questions),
        scored=len(means),
        mean=_mean(means),
        stderr=standard_error(means),
        pass_at=pass_at,
        by_repeat=tuple(_mean([q.scores[r] for q in questions if r in q.scores]) for r in range(repeats)),
        played=sum(len(q.scores) for q in questions),
        failed=dict(sorted(Counter(kind for q in questions for kind in q.failed.values()).items())),
    )


def by_tag(questions: Sequence[QuestionScores], repeats: int) -> dict[str, dict[str, SetScores]]:
    """Tag -> value -> the figures of its questions."""
    found: dict[str, dict[str, list[QuestionScores]]] = {}
    for question in questions:
        for tag, value in question.tags.items():
            found.setdefault(tag, {}).setdefault(value, []).append(question)
    return {
        tag: {value: score_set(found[tag][value], repeats) for value in sorted(found[tag])}
        for tag in sorted(found)
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n rollouts, drawn without replacement, hold one of the c right
    ones. Raises ValueError where 0 <= c <= n and 1 <= k <= n do not hold."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right ones among {n}: expected 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def standard_error(means: Sequence[float]) -> float:
    """Of the mean of independent numbers; NaN below two."""
    n = len(means)
    if n < 2:
        return math.nan
    mean = _mean(means)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in means) / (n - 1) / n)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
