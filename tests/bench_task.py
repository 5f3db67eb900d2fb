"""A task over question files for tests: it says whatever it is asked in every place where a task may say something."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mgrpo.benchmarks import QuestionFile
from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question, Split, Task
from mgrpo.errors import InfrastructureError
from mgrpo.model.policy import save_policy
from mgrpo.types import Rollout
from tests.models import tiny_policy

KEY_ENV = "MGRPO_TEST_SERVICE_KEY"


class AskTask(Task):
    """options: questions (see QuestionFile); tools, {} for none; lost, ids of questions that nothing answers; every:
    rollout number n of a question is lost where n + 1 is a multiple of it; stop: a token that ends a turn."""

    roles = ("main",)

    def __init__(self, options: Mapping[str, object], roles: Sequence[str]) -> None:
        unknown = sorted(options.keys() - {"questions", "tools", "lost", "every", "stop"})
        if unknown:
            raise ValueError(f"unknown options {unknown}")
        self._source = QuestionFile.of(options["questions"])
        self._tools = options.get("tools", {"search": {}})
        self._lost, self._every = list(options.get("lost", [])), int(str(options.get("every", 0)))  # type: ignore[call-overload]
        self._stop = str(options.get("stop", "w0"))
        self.events: list[str] = []

    def question(self, index: int, seed: int) -> Question:
        return self._source.question(index, seed)

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return self._source.questions(split, n, seed)

    def question_set(self, split: Split) -> Sequence[Question]:
        return self._source.question_set(split)

    def digests(self) -> Mapping[str, str]:
        return {"scorer": "rule-even", "corpus": "c0ffee"}

    async def preflight(self) -> None:
        self.events.append("preflight")

    async def close(self) -> None:
        self.events.append("close")

    def build_policy(self, role: str, seed: int, path: str) -> None:
        save_policy(tiny_policy("shift", seed), path)

    async def play(self, question: Question, episode: Episode) -> Rollout:
        self.events.append(f"{question.id}/{episode.rollout}")
        key = os.environ.get(KEY_ENV, "")
        if question.id in self._lost or (self._every and (episode.rollout + 1) % self._every == 0):
            raise InfrastructureError(f"no answer for {question.text} with {key}")
        main = episode.open("main")
        main.append(question.text)
        answer = await main.sample(3, stop=self._stop)
        right = main.last_sampled() % 2 == 0 and bool(self._tools)
        main.close(format=1.0)
        episode.metric("blocked", 2)
        call = {"role": "main", "invocation": 0, "turn": 0, "tool": question.text, "arguments": question.text}
        return episode.finish(
            float(right),
            answer=f"{answer} {question.answer}",
            question_id=question.id,
            tools=[call | {"status": "ok", "source": question.text, "seconds": 0.5, "chars": 9}],
            verdict={
                "rule": "exact",
                "rule_score": float(right),
                "judge": question.answer,
                "source": "live",
                "digest": "5c0re",
            },
            calls=[{"task": question.text, "result": question.answer}],
            guess=question.answer,
        )
