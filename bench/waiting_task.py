"""A task whose tools do nothing but wait, and an engine that costs nothing, for bench/bench_rollouts.py.

Each rollout samples one token, waits for its tool and samples another one. How long it waits is drawn from (seed,
index, rollout) by bench.waits, so that the simulator can wait the same. At most `slots` rollouts of a worker are under
way at once, whoever starts them: that many places the tools have. Each line of the log is one rollout:
index, rollout, start (monotonic seconds), seconds of the wait, seconds that it took.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from bench.waits import waits
from mgrpo.addresses import Addresses
from mgrpo.config import AgentView
from mgrpo.engines.backend import EngineBackend
from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.episode import Conversation, Episode
from mgrpo.environments.task import Question, Split, Task
from mgrpo.model.policy import save_policy
from mgrpo.model.policy_files import policy_from_files
from mgrpo.model.tokens import Tokenizer
from mgrpo.types import Rollout
from mgrpo.weights.version import Weights
from tests.models import tiny_policy


class WaitingTask(Task):
    """options: log (a folder, one file a worker), k, sigma, median (seconds), slots (of each worker)."""

    roles = ("main",)

    def __init__(self, options: Mapping[str, object], roles: Sequence[str]) -> None:
        self._log = Path(str(options["log"]))
        self._k, self._slots = int(str(options["k"])), int(str(options["slots"]))
        self._sigma, self._median = float(str(options["sigma"])), float(str(options["median"]))
        self._places: asyncio.Semaphore | None = None
        self._lines: TextIO | None = None

    def question(self, index: int, seed: int) -> Question:
        return Question("w1 w2", answer="", info={"index": index})

    def questions(self, split: Split, n: int, seed: int = 0) -> Sequence[Question]:
        return [Question("w1 w2", answer="") for _ in range(n)]

    def build_policy(self, role: str, seed: int, path: str) -> None:
        save_policy(tiny_policy("shift", seed), path)

    async def play(self, question: Question, episode: Episode) -> Rollout:
        main = episode.open("main")
        main.append(question.text)
        if "index" not in question.info:  # an evaluation
            return await self._end(main, episode)
        index = int(str(question.info["index"]))
        if self._places is None:
            self._places = asyncio.Semaphore(self._slots)
        async with self._places:
            seconds = waits(index, self._k, self._sigma, self._median)[episode.rollout]
            start = time.monotonic()
            await main.sample(1, stop="w0")
            await asyncio.sleep(seconds)
            took = time.monotonic() - start
            self._write(f"{index} {episode.rollout} {start:.6f} {seconds:.6f} {took:.6f}\n")
        main.append("w3")
        return await self._end(main, episode)

    async def _end(self, main: Conversation, episode: Episode) -> Rollout:
        await main.sample(1, stop="w0")
        main.close(format=float(episode.rollout % 2))
        return episode.finish(1.0)

    def _write(self, line: str) -> None:
        if self._lines is None:
            self._log.mkdir(parents=True, exist_ok=True)
            self._lines = (self._log / f"{time.monotonic_ns()}.log").open("w", buffering=1)
        self._lines.write(line)


class FreeEngine(Engine):
    """Always samples token 0, at once."""

    def __init__(self) -> None:
        self._version = -1

    @property
    def version(self) -> int:
        return self._version

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        ids, logprobs = np.zeros(1, np.int32), np.full(1, -4.6, np.float32)
        return Generation(ids, logprobs, np.full(1, self._version, np.int32), "stop")

    async def load(self, path_or_state: object, version: int) -> None:
        assert isinstance(path_or_state, Weights)
        self._version = version


class FreeBackend(EngineBackend):
    @classmethod
    def open(
        cls,
        view: AgentView,
        files: Mapping[str, bytes],
        addresses: Addresses,
        on_event: Callable[[str], None],
    ) -> tuple[Engine, Tokenizer]:
        return FreeEngine(), policy_from_files(files, view.role).tokenizer
