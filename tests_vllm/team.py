"""A program of two agents for one test of a whole run: it knows a base URL and nothing of mgrpo but that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mgrpo.environments.task import Question, Split
from mgrpo.gateway.harness import Access, HarnessTask
from tests.harness_kit import post


class FactTask(HarnessTask):
    """Main plans, two researchers work at the same time, main answers; main's outcome follows from what it says."""

    async def run(self, question: Question, base_url: Access) -> object:
        chat = [{"role": "user", "content": question.text}]
        chat.append(await turn(base_url, "main", chat))
        tasks = [
            [{"role": "user", "content": f"{how}: {chat[-1]['content']}"}] for how in ("Shorter", "In French")
        ]
        found = await asyncio.gather(*(turn(base_url, "sub", task) for task in tasks))
        chat.append({"role": "user", "content": " ".join(reply["content"] for reply in found)})
        return (await turn(base_url, "main", chat))["content"]

    def score(self, question: Question, answer: object) -> float:
        return float(len(str(answer)) % 2)

    def question(self, index: int, seed: int) -> Question:
        return Question(f"Tell me a fact about the number {index + seed}.", "odd")

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [self.question(100 + i, seed) for i in range(n)]


async def turn(base_url: Access, role: str, messages: Sequence[dict[str, str]]) -> dict[str, str]:
    """The assistant's message, as a program appends it to its history."""
    body = {"model": role, "messages": list(messages), "max_tokens": 12, "stop": ["."]}
    answer = await post(base_url, f"{base_url}/chat/completions", body, timeout=300)
    return dict(answer["choices"][0]["message"])
