"""A task for one test of a whole run: two roles that share a real model, rewards that follow from what it samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mgrpo.environments.episode import Episode
from mgrpo.environments.task import Question, Split, Task
from mgrpo.types import Rollout

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
STOP = "<|im_end|>"


class EchoTask(Task):
    roles = ("main", "sub")

    def __init__(self, options: Mapping[str, object], roles: Sequence[str]) -> None:
        pass

    def question(self, index: int, seed: int) -> Question:
        return Question(f"Tell me a fact about the number {index + seed}.", answer="even")

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [self.question(100 + i, seed) for i in range(n)]

    async def play(self, question: Question, episode: Episode) -> Rollout:
        main = episode.open("main")
        main.append(PROMPT.format(question.text))
        said = await main.sample(10, stop=STOP)
        sub = episode.open("sub")
        sub.append(PROMPT.format(f"Say it shorter: {said}"))
        await sub.sample(8, stop=STOP)
        sub.close(format=1.0, expert=float(sub.last_sampled() % 2))
        main.append("\n<|im_start|>user\nOne word?<|im_end|>\n<|im_start|>assistant\n")
        await main.sample(4, stop=STOP)  # a second turn: the prefix is in the server's cache
        main.close(format=1.0)
        return episode.finish(float(main.last_sampled() % 2))
