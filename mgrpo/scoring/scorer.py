"""The score of a team's answer: the rule first, then the judge for what the rule does not accept. Both are recorded.

    answer -> rule: accepted ------------------------------> 1
                    not accepted -> no judge --------------> what the rule gave, 0..1
                                 -> judge: correct --------> 1
                                           incorrect ------> 0
                                           no verdict -----> InfrastructureError, never a score

A rule accepts what it gives 1. With a judge, partial credit of the rule (f1) is recorded and not paid: the judge knows
more. No answer is worth 0, and no judge is asked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from mgrpo.environments.task import Question
from mgrpo.scoring.judge import Judge
from mgrpo.scoring.rules import find_rule, score
from mgrpo.tools.base import Source


@dataclass(frozen=True, slots=True)
class Outcome:
    """correct: what is paid, 0..1. rule: what the rule gave, 0..1. judge: "" where it was not asked; source: where its
    reply came from. digest: of the scorer that decided."""

    correct: float
    rule: float
    judge: Literal["correct", "incorrect", ""]
    source: Source | Literal[""]
    digest: str
    seconds: float = 0.0
    """Spent on the judge."""


class Scorer:
    """See the module's docstring."""

    def __init__(self, rule: str = "gaia", judge: Judge | None = None) -> None:
        """The judge is closed with the scorer. Raises ConfigError for an unknown rule."""
        find_rule(rule)
        self.rule, self.judge = rule, judge
        self.digest = hashlib.sha256(f"{rule}\n{judge.digest if judge else ''}".encode()).hexdigest()[:16]
        """Names rule, judge and prompt: equal digests score alike."""
        self._accepted = self._answers = 0

    async def score(self, question: Question, answer: str | None, occurrence: str = "") -> Outcome:
        """answer: None where the team gave none, or in a form that does not count. occurrence: as of Judge.verdict().
        Raises what the judge raises."""
        given = answer if answer and answer.strip() else None
        rule = score(self.rule, given, question.gold)
        self._answers += 1
        self._accepted += rule == 1.0
        if rule == 1.0 or self.judge is None or given is None:
            return Outcome(rule, rule, "", "", self.digest)
        verdict = await self.judge.verdict(question.text, question.gold, given, occurrence)
        word: Literal["correct", "incorrect", ""] = "correct" if verdict.correct else "incorrect"
        if not verdict.source:
            word = ""  # nothing of the answer is visible: the judge was not asked
        return Outcome(float(verdict.correct), rule, word, verdict.source, self.digest, verdict.seconds)

    def record(self, outcome: Outcome) -> dict[str, object]:
        """What rollout.info keeps of it, under the name `verdict`."""
        return {
            "rule": self.rule,
            "rule_score": outcome.rule,
            "judge": outcome.judge,
            "source": outcome.source,
            "digest": outcome.digest,
        }

    async def calibrate(self) -> float:
        """The judge's agreement with its calibration list; 1.0 without a judge. Raises ConfigError; see Judge."""
        return 1.0 if self.judge is None else await self.judge.calibrate()

    def metrics(self) -> dict[str, float]:
        """Full name -> count since it was made."""
        own = {"scorer/answers": float(self._answers), "scorer/rule_accepted": float(self._accepted)}
        return own | (self.judge.metrics() if self.judge else {})

    async def close(self) -> None:
        """Close the judge's connections. Idempotent."""
        if self.judge is not None:
            await self.judge.close()
