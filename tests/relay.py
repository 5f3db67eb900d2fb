"""A task for tests of the run: tiny, wordless, with two sub-agent roles and every d_k from 0 to 3.

Which sub-agents are called, and whether the answer is right, follows from what the main agent happens to sample, so
rewards differ within groups and there is something to learn from the first step on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.task import Question, Split, StartReport, Task
from mgrpo.errors import InfrastructureError
from mgrpo.model.policy import save_policy
from mgrpo.types import Rollout
from tests.models import tiny_policy

ROLES = ("main", "left", "right")
KEY_ENV = "MGRPO_RELAY_KEY"
SECRETS = ("w61 w72 w83", "w94 w95 w96")
"""Question and answer of every secret one."""


class RelayTask(Task):
    """options: {"fail_every": n} makes every n-th rollout of a query fail for good, {"lose_every": n} all rollouts of
    every n-th query, {"outage": "batches" or "evaluations"} all of training or of the evaluations, {"valid": false}
    fails the start validation, {"bug": true} makes every rollout raise an error of the task's own code,
    {"secret": true} evaluates on secret questions, of which it says all in every place where a task may say something.
    """

    roles = ROLES

    def __init__(self, options: Mapping[str, object], roles: Sequence[str]) -> None:
        if set(roles) not in ({"main"}, set(ROLES)):
            raise ValueError(f"roles {list(roles)} given, expected {list(ROLES)} or main alone")
        self.roles = tuple(roles)
        self._fail_every = int(str(options.get("fail_every", 0)))
        self._lose_every = int(str(options.get("lose_every", 0)))
        self._outage, self._secret = options.get("outage"), bool(options.get("secret"))
        self._valid, self._bug = bool(options.get("valid", True)), bool(options.get("bug", False))

    def question(self, index: int, seed: int) -> Question:
        return Question(f"w{1 + index % 7} w{1 + seed % 5}", answer="even", info={"index": index})

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        if self._secret:
            return [Question(*SECRETS, info={"index": i}, id=f"secret-{i}", secret=True) for i in range(n)]
        return [self.question(i, seed) for i in range(n)]

    def single_agent(self, options: Mapping[str, object]) -> Mapping[str, object]:
        return options

    def build_policy(self, role: str, seed: int, path: str) -> None:
        save_policy(tiny_policy("shift", seed * 10 + ROLES.index(role)), path)

    async def validate_start(self, agents: Mapping[str, Agent], n: int, seed: int) -> StartReport:
        return StartReport({"readiness": (float(self._valid), 0.5, 1.0)})

    async def play(self, question: Question, episode: Episode) -> Rollout:
        if self._bug:
            raise RuntimeError("the relay has a bug")
        if self._fail_every and episode.rollout % self._fail_every == self._fail_every - 1:
            raise InfrastructureError("the relay is down")
        if self._outage == ("evaluations" if episode.query.startswith("eval/") else "batches"):
            raise InfrastructureError("the relay is gone")
        if self._lose_every and int(str(question.info["index"])) % self._lose_every == 1:
            raise InfrastructureError("nobody answers this question")
        if question.id == "secret-1":
            raise InfrastructureError(f"{question.text} is not answered for {os.environ.get(KEY_ENV)}")
        main = episode.open("main")
        main.append(question.text)
        await main.sample(4, stop="w0")
        first = main.last_sampled()
        for role, calls in (("left", first % 4), ("right", first % 3)):
            for call in range(calls if role in self.roles else 0):
                sub = episode.open(role)
                sub.append(f"w{call + 1} w{first % 50}")
                await sub.sample(3, stop="w0")
                sub.append("w3")  # a tool's answer: seen, not trained on
                await sub.sample(2, stop="w0")
                sub.close(format=1.0, expert=float(sub.last_sampled() % 3 == 0))
        main.append("w2")
        await main.sample(3, stop="w0")
        main.close(format=float(len(main) % 2))
        info = {"answer": question.answer, "calls": [{"task": question.text}]} if question.secret else {}
        return episode.finish(float(main.last_sampled() % 2 == 0), **info)
