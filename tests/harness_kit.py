"""A small team behind the gateway for tests of harnesses: agents that a script plays, and programs that ask them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.environments.episode import Agent
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.environments.task import Question, Split, Task
from mgrpo.gateway.harness import Access, HarnessTask
from mgrpo.pipeline.play import RolloutRequest, RolloutResult, play
from mgrpo.types import Rollout
from tests.research_kit import END, FIJI, PLAIN

Script = Callable[[str], str]
PROGRAM = """
import json, os, sys, urllib.request

def ask(role, text, base=os.environ["OPENAI_BASE_URL"]):
    body = json.dumps({"model": role, "messages": [{"role": "user", "content": text}]}).encode()
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(base + "/chat/completions", body, headers), timeout=60) as got:
        return json.load(got)["choices"][0]["message"]["content"]

question = json.load(sys.stdin)
"""
"""The beginning of a program without an SDK."""


class Engine(ScriptedEngine):
    """Says what the script makes of the chat so far. failures: errors that are raised first. held: sessions that were
    asked for and not released."""

    def __init__(self, script: Script, failures: Sequence[Exception] = ()) -> None:
        super().__init__(lambda chat: script(chat) + END, PLAIN)
        self.failures, self.held = list(failures), set[str]()

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        assert session is not None
        self.held.add(session)
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        return await super().generate(prompt_ids, params, seed=seed, session=session)

    def release(self, session: str) -> None:
        self.held.discard(session)


def agents(engine: ScriptedEngine, max_length: int = 2000) -> dict[str, Agent]:
    return {role: Agent(role, engine, PLAIN, 1.0, max_length) for role in ("main", "sub")}


def echo(chat: str) -> str:
    """The last message, told apart from what was asked."""
    return f"said {chat.split('<|im_start|>')[-2].split(chr(10), 1)[1].split(END)[0]}"


async def ask(base_url: Access, role: str, *messages: str) -> str:
    """One turn: messages of the user and the assistant by turns, the last of them the user's."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    answer = await post(base_url, f"{base_url}/chat/completions", {"model": role, "messages": chat})
    return str(answer["choices"][0]["message"]["content"])


async def post(access: Access, url: str, body: Mapping[str, object], timeout: float = 60) -> dict[str, Any]:
    """Raises httpx2.HTTPStatusError for a refusal. timeout: seconds."""
    async with httpx2.AsyncClient(timeout=timeout, trust_env=False, verify=False) as http:
        answer = await http.post(url, json=dict(body), headers=access.headers)
        answer.raise_for_status()
        return dict(answer.json()) if answer.content else {}


def ask_blocking(base_url: Access, role: str, text: str) -> httpx2.Response:
    """A first turn, as a program without asyncio asks for it."""
    body = {"model": role, "messages": [{"role": "user", "content": text}]}
    with httpx2.Client(timeout=60, trust_env=False, verify=False) as http:
        return http.post(f"{base_url}/chat/completions", json=body, headers=base_url.headers)


async def team(question: Question, base_url: Access) -> object:
    """Main asks two sub-agents, one after the other, and answers."""
    plan = await ask(base_url, "main", question.text)
    for task in ("first", "second"):
        await ask(base_url, "sub", task)
    await ask(base_url, "main", question.text, plan, "And now?")
    return question.answer


class KitTask(HarnessTask):
    """Asks one question, FIJI."""

    def question(self, index: int, seed: int) -> Question:
        return FIJI

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [FIJI] * n


class FunctionTask(KitTask):
    """Plays what it is given; the outcome is 1 for FIJI's answer."""

    def __init__(
        self,
        harness: Callable[[Question, Access], object],
        options: Mapping[str, object] | None = None,
        score: Callable[[Question, object], Any] | None = None,
    ) -> None:
        self._harness, self._given = harness, score
        super().__init__(options or {}, ("main", "sub"))

    async def run(self, question: Question, base_url: Access) -> object:
        answer = self._harness(question, base_url)
        return await answer if asyncio.iscoroutine(answer) else answer

    def score(self, question: Question, answer: object) -> Any:
        return float(answer == question.answer) if self._given is None else self._given(question, answer)


def played(
    task: Task,
    engine: ScriptedEngine | None = None,
    question: Question = FIJI,
    deadline: float | None = None,
) -> RolloutResult:
    """What comes of one rollout; the task is closed afterwards."""

    async def one() -> RolloutResult:
        team = agents(engine or Engine(echo))
        try:
            async with asyncio.timeout(100):
                return await play(task, RolloutRequest("7/3", question, 1), team, 1, None, deadline)
        finally:
            await task.close()

    return asyncio.run(one())


def rollout_of(result: RolloutResult) -> Rollout:
    assert result.rollout is not None, result.failure
    return result.rollout


def program(folder: Path, text: str) -> Path:
    """A program in a file."""
    file = folder / "team.py"
    file.write_text(PROGRAM + text)
    return file
