"""A task for tests of pretrained policies: each agent says a few tokens in its chat template, and which ones decides.

The main agent is right when its first token is even, a sub-agent when its own is: rewards differ within groups whatever
the model, so that both roles have something to learn, and something different.
"""

from __future__ import annotations

from collections.abc import Sequence

from mgrpo.environments.episode import Chat, Episode
from mgrpo.environments.task import Question, Split, Task
from mgrpo.types import Rollout


class MurmurTask(Task):
    roles = ("main", "sub")

    def question(self, index: int, seed: int) -> Question:
        return Question(f"{index % 7}", "even")

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [self.question(i, seed) for i in range(n)]

    async def play(self, question: Question, episode: Episode) -> Rollout:
        first: dict[str, int] = {}
        for role in ("sub", "main"):
            conversation = episode.open(role)
            chat = Chat(conversation)
            chat.begin([{"role": "user", "content": question.text}])
            begin = len(conversation)
            await chat.reply(4)
            first[role] = int(conversation.trajectory().tokens[begin])
            expert = {"expert": float(first[role] % 3 == 0)} if role == "sub" else {}
            conversation.close(format=1.0, **expert)
        return episode.finish(float(first["main"] % 2 == 0))
