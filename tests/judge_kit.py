"""A model in place of a judge's: replies by a script or a function, and what it was asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from mgrpo.errors import MgrpoError
from mgrpo.scoring.calibration import EXPERT_CASES, JUDGE_CASES
from mgrpo.scoring.expert import Expert, ExpertConfig
from mgrpo.scoring.judge import Judge, JudgeConfig
from mgrpo.scoring.text import of_candidate
from mgrpo.services.client import Reply

URL = "http://127.0.0.1:9"  # nobody is there, and nobody is asked
Says = Callable[[str], str]


class FakeModel:
    """says: prompt -> reply, or replies in order, of which an error is raised. seconds of each reply: 0.5."""

    def __init__(self, says: Says | Sequence[str | MgrpoError]) -> None:
        self._says = says
        self.prompts: list[str] = []
        self.asked: list[tuple[bool, bool, str]] = []  # (a schema was given, pure, occurrence)
        self.closed = 0

    async def complete(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        schema: Mapping[str, object] | None = None,
        pure: bool = True,
        occurrence: str = "",
    ) -> Reply[str]:
        (message,) = messages
        assert message["role"] == "user"
        prompt = str(message["content"])
        self.prompts.append(prompt)
        self.asked.append((schema is not None, pure, occurrence))
        reply = self._says(prompt) if callable(self._says) else self._says[len(self.prompts) - 1]
        if isinstance(reply, MgrpoError):
            raise reply
        return Reply(reply, "live", 0.5)

    async def close(self) -> None:
        self.closed += 1


def judge_of(says: Says | Sequence[str | MgrpoError], **settings: object) -> tuple[Judge, FakeModel]:
    model = FakeModel(says)
    config = JudgeConfig.model_validate({"url": URL, "model": "fake", **settings})
    return Judge(config, service=model), model


def expert_of(says: Says | Sequence[str | MgrpoError], **settings: object) -> tuple[Expert, FakeModel]:
    model = FakeModel(says)
    config = ExpertConfig.model_validate({"url": URL, "model": "fake", **settings})
    return Expert(config, service=model), model


def shown_of(prompt: str, mark: str) -> str:
    """What stands between the marks of that name in a built-in prompt."""
    found = re.search(rf"<{mark}>\n(.*?)\n</{mark}>", prompt, re.DOTALL)
    assert found is not None
    return found[1]


def knows(prompt: str) -> str:
    """A judge that knows the built-in cases."""
    question, answer = shown_of(prompt, "question"), shown_of(prompt, "candidate_answer")
    case = next(c for c in JUDGE_CASES if c.question == question and of_candidate(c.answer, 4000) == answer)
    return f'{{"reason": "known", "verdict": "{"correct" if case.correct else "incorrect"}"}}'


def knows_reports(prompt: str) -> str:
    """An expert that knows the built-in cases."""
    case = next(c for c in EXPERT_CASES if of_candidate(c.report, 4000) == shown_of(prompt, "report"))
    return f"Score: {8 if case.low else 1}"
