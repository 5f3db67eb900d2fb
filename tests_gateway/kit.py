"""A rollout that a program of another environment makes: scripted policies behind a real gateway, and the proof that
what is trained is what was sampled.

    play(program, scripts)  ->  Gateway + GatewayRollout on this loop  <--HTTP--  the program, in .venv-gateway

The policies write their turns letter by letter, so that the text of a turn encodes to other ids than it was sampled
with: whoever encodes a history again trains on other tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.environments.episode import Agent, Episode
from mgrpo.environments.scripted import ScriptedEngine
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.rollout import Forms, GatewayRollout
from mgrpo.gateway.server import Gateway
from mgrpo.tools.calls import render
from mgrpo.types import Trajectory
from tests.chat_templates import QWEN3

ROOT = Path(__file__).parent.parent
PYTHON = Path(os.environ.get("GATEWAY_PYTHON", ROOT / ".venv-gateway" / "bin" / "python"))
EXAMPLES = ROOT / "examples" / "gateway"
PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 90.0  # of one program; the slowest takes three on a machine of one's own
END, GENERATION = "<|im_end|>", "<|im_start|>assistant\n"
TOKENIZER = QWEN3.tokenizer()

Script = Callable[[str, int], str]
"""(the whole chat so far, number of the conversation among those of its role) -> the next turn, without its end."""


class LetterByLetter:
    """A tokenizer whose encoder merges nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(text.split(END)):
            ids += [self._tokenizer.convert_tokens_to_ids(END)] if number else []
            for letter in part:
                ids += self._tokenizer.encode(letter, add_special_tokens=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))


class RecordingEngine(ScriptedEngine):
    """Remembers for each turn what it was asked and what it sampled."""

    def __init__(self, script: Script) -> None:
        super().__init__(lambda text: script(text, self._number) + END, LetterByLetter(TOKENIZER))
        self.turns: list[tuple[list[int], list[int]]] = []
        self._sessions: list[str | None] = []
        self._number = 0

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        if session not in self._sessions:
            self._sessions.append(session)
        self._number = self._sessions.index(session)
        await asyncio.sleep(0)  # neighbours come in between, as in a real engine
        self._number = self._sessions.index(session)
        out = await super().generate(prompt_ids, params, seed=seed, session=session)
        self.turns.append(([int(i) for i in prompt_ids], [int(i) for i in out.token_ids]))
        return out


@dataclass(frozen=True)
class Played:
    """What a program has made of a rollout. answer: that in the last line which it printed."""

    rollout: GatewayRollout
    engines: Mapping[str, RecordingEngine]
    answer: Any

    def trajectories(self, role: str) -> list[Trajectory]:
        """Of a role, by invocation."""
        found = {key[1]: c for key, c in self.rollout.conversations().items() if key[0] == role}
        assert sorted(found) == list(range(len(found)))
        return [found[number].trajectory() for number in sorted(found)]

    @property
    def d_k(self) -> int:
        """Invocations of the researcher."""
        return len(self.trajectories("researcher"))


@contextlib.asynccontextmanager
async def opened(scripts: Mapping[str, Script], **options: Any) -> AsyncIterator[tuple[Played, str]]:
    """A rollout behind its base URL."""
    engines = {role: RecordingEngine(script) for role, script in scripts.items()}
    agents = {
        role: Agent(role, engine, TOKENIZER, temperature=1.0, max_length=32768)
        for role, engine in engines.items()
    }
    episode = Episode("q", 0, agents, seed=1)
    settings = GatewayOptions(turn_tokens=4096, **options)
    gateway = Gateway(settings)
    await gateway.start()
    try:
        rollout = GatewayRollout(episode, settings, Forms(settings))
        yield Played(rollout, engines, None), gateway.open(rollout)
        gateway.close_rollout(rollout)
    finally:
        await gateway.close()


def play(
    program: Path,
    scripts: Mapping[str, Script],
    *arguments: str,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Played:
    """Run a program of the other environment against scripted policies until it ends. options: the gateway's."""

    async def played() -> Played:
        async with opened(scripts, **options) as (before, url):
            answer = await ran(program, arguments, before.rollout.token, url, env or {})
            return Played(before.rollout, before.engines, answer)

    return asyncio.run(played())


async def ran(program: Path, arguments: Sequence[str], token: str, url: str, env: Mapping[str, str]) -> Any:
    """The answer that the program printed. It gets the question as a run would give it."""
    access = {
        "OPENAI_BASE_URL": url,
        "OPENAI_API_KEY": token,
        "ANTHROPIC_BASE_URL": url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": token,
    }
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    process = await asyncio.create_subprocess_exec(
        str(PYTHON), "-W", "ignore", str(program), *arguments,
        env={**kept, **access, "PYTHONPATH": str(EXAMPLES), "LANGSMITH_TRACING": "false", **env},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        question = json.dumps({"text": QUESTION}).encode()
        out, err = await asyncio.wait_for(process.communicate(question), SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    sys.stderr.write(err.decode())  # shown by pytest where the test fails
    assert process.returncode == 0, err.decode()[-2000:]
    return json.loads(out.decode().splitlines()[-1])["answer"]


# -- what every rollout must be --


def segments(trajectory: Trajectory) -> list[tuple[list[int], list[int]]]:
    """(tokens, loss mask) of each segment."""
    starts = [*getattr(trajectory, "segment_starts", (0,)), len(trajectory.tokens)]
    return [
        (trajectory.tokens[a:b].tolist(), trajectory.loss_mask[a:b].tolist())
        for a, b in itertools.pairwise(starts)
    ]


def sampled_runs(tokens: Sequence[int], mask: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """(history, turn) of each run of sampled tokens."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [(list(tokens[:a]), list(tokens[a:b])) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def check_trained_is_sampled(played: Played) -> int:
    """Each turn is trained once, with its ids and behind the history it was sampled from, and nothing else is trained;
    whoever had encoded a trajectory again would have trained on other ids. Returns the number of trajectories."""
    count = 0
    for role, engine in played.engines.items():
        trained = []
        for trajectory in played.trajectories(role):
            runs = [run for segment in segments(trajectory) for run in sampled_runs(*segment)]
            texts = [TOKENIZER.decode(turn) for _, turn in runs]
            encoded = [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]
            assert any(ids != turn for ids, (_, turn) in zip(encoded, runs, strict=True))
            trained += runs
            count += 1
        assert sorted(trained) == sorted(engine.turns)
    return count


def context(trajectory: Trajectory) -> str:
    """The text that was not sampled."""
    return str(TOKENIZER.decode(trajectory.tokens[trajectory.loss_mask == 0].tolist()))


def said(trajectory: Trajectory) -> list[str]:
    """The text of each sampled turn."""
    runs = [run for segment in segments(trajectory) for run in sampled_runs(*segment)]
    return [str(TOKENIZER.decode(turn)).removesuffix(END) for _, turn in runs]


# -- policies --

QUESTION = "What is the capital of Fiji, and what of Tonga?"
FIJI, TONGA = "What is the capital of Fiji?", "What is the capital of Tonga?"
ANSWER = "Suva and Nuku'alofa."


def turn(text: str) -> int:
    """Number of the turn that comes next, from 0: counted from the task on, which names a country."""
    task = min(place for name in ("Fiji", "Tonga") if (place := text.find(name)) >= 0)
    return text.count(GENERATION, task) - 1


def call(name: str, **arguments: object) -> str:
    return render("hermes", (name, arguments))


def capital(text: str) -> str:
    """What a researcher reports of the document that it has found last."""
    return "Suva" if "Suva" in text else "Nuku'alofa"
