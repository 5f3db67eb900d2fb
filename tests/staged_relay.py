"""The relay as a task with a curriculum: its questions depend on an option, it notes its first and last word, and it
offers an evaluation set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question
from mgrpo.errors import InfrastructureError
from mgrpo.types import Rollout
from tests.relay import RelayTask


class StagedRelay(RelayTask):
    """options, beside the relay's: {"questions": {"level": n}} makes the n-th kind of question, {"notes": path} gets a
    line "<word> <pid>" for each call of preflight() and close(), {"refuse": text} is what preflight() raises."""

    evaluation_sets = ("probe",)

    def __init__(self, options: Mapping[str, object], roles: Sequence[str]) -> None:
        super().__init__(options, roles)
        questions = options.get("questions")
        self.level = int(questions["level"]) if isinstance(questions, dict) else 0
        self._notes, self._refuse = options.get("notes"), options.get("refuse")

    def question(self, index: int, seed: int) -> Question:
        text = f"w{10 * self.level + 1 + index % 7} w{1 + seed % 5}"
        return Question(text, "even", {"index": index}, id=f"level-{self.level}/{index}")

    def evaluation_set(self, name: str, n: int | None = None) -> Sequence[Question]:
        return [
            Question(f"w{30 + i}", "even", {"index": i}, id=f"{name}/{i}", tags={"half": "ab"[i % 2]})
            for i in range(6 if n is None else n)
        ]

    async def play(self, question: Question, episode: Episode) -> Rollout:
        if question.id.startswith("level-"):  # of training, validation or heldout: of this task's own level
            assert question.id.startswith(f"level-{self.level}/"), question.id
        return await super().play(question, episode)

    async def preflight(self) -> None:
        self._note("preflight")
        if self._refuse is not None:
            raise InfrastructureError(str(self._refuse))

    async def close(self) -> None:
        self._note("close")

    def _note(self, word: str) -> None:
        if self._notes is not None:
            with Path(str(self._notes)).open("a") as file:
                file.write(f"{word} {self.level} {os.getpid()}\n")
