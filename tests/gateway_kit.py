"""A rollout behind the gateway without HTTP: policies that speak in ids which no text encodes to, and programs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mgrpo.engines.base import Engine, Generation, SamplingParams
from mgrpo.environments.episode import Agent, Episode
from mgrpo.gateway.errors import GatewayError
from mgrpo.gateway.forms import Forms
from mgrpo.gateway.options import GatewayOptions
from mgrpo.gateway.rollout import GatewayRollout
from mgrpo.gateway.turn import TurnReply, TurnRequest
from tests.chat_templates import QWEN3, Family

Script = Callable[[str, int], str]
"""(text of the segment so far, seed) -> what the policy says."""


class LetterEngine(Engine):
    """Says what `script` returns, letter by letter, and the end of the turn: the ids are none that a tokenizer makes of
    the text. gate: where it is set, turns wait for it. A script that raises fails the turn."""

    def __init__(self, script: Script, tokenizer: Any, end: str) -> None:
        self.script, self.tokenizer = script, tokenizer
        self.end = int(tokenizer.convert_tokens_to_ids(end))
        self.gate: asyncio.Event | None = None
        self.asked: list[list[int]] = []
        self.sampled: list[list[int]] = []
        self.sessions: list[str | None] = []
        self.params: list[SamplingParams] = []
        self.seeds: list[int] = []
        self.released: list[str] = []

    @property
    def version(self) -> int:
        return 3

    def letters(self, text: str) -> list[int]:
        """The ids of a text, one of each letter at least, and a token of each control token's text."""
        known = [t.content for t in self.tokenizer.added_tokens_decoder.values()]
        ids: list[int] = []
        while text:
            whole = next((t for t in known if text.startswith(t)), text[0])
            ids += self.tokenizer.encode(whole, add_special_tokens=False)
            text = text[len(whole) :]
        return ids

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        turn = len(self.asked)
        self.asked.append(list(prompt_ids))
        self.sampled.append([])
        self.params.append(params)
        self.seeds.append(seed)
        self.sessions.append(session)
        if self.gate is not None:
            await self.gate.wait()
        words = self.script(self.tokenizer.decode(list(prompt_ids)), seed)
        ids = [*self.letters(words), self.end]
        for n in range(1, len(ids)):
            if any(stop in self.tokenizer.decode(ids[:n]) for stop in params.stop):
                ids = ids[:n]
                break
        stopped = len(ids) <= params.max_tokens
        ids = ids[: params.max_tokens]
        self.sampled[turn] = ids
        n = len(ids)
        logprobs = np.asarray([-0.5 - i / 64 for i in range(n)], np.float32)
        return Generation(
            np.asarray(ids, np.int32), logprobs, np.full(n, 3, np.int32), "stop" if stopped else "length"
        )

    async def load(self, path_or_state: object, version: int) -> None:
        raise NotImplementedError

    def release(self, session: str) -> None:
        self.released.append(session)


class Team:
    """A rollout of main and sub over two engines."""

    def __init__(
        self,
        script: Script,
        *,
        family: Family = QWEN3,
        sub: Script | None = None,
        max_length: int = 2000,
        seed: int = 1,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.tokenizer = family.tokenizer()
        end = family.stop if isinstance(family.stop, str) else family.stop[""]
        self.engines = {
            "main": LetterEngine(script, self.tokenizer, end),
            "sub": LetterEngine(sub or script, self.tokenizer, end),
        }
        agents = {
            role: Agent(role, engine, self.tokenizer, 1.0, max_length)
            for role, engine in self.engines.items()
        }
        self.options = GatewayOptions(**options)
        self.episode = Episode("7/3", 2, agents, seed)
        self.forms = Forms(self.options, template)
        self.rollout = GatewayRollout(self.episode, self.options, self.forms)

    def text(self, role: str = "main", invocation: int = 0) -> str:
        """All that a conversation saw and said."""
        return str(self.tokenizer.decode(self.trajectory(role, invocation).tokens.tolist()))

    def trajectory(self, role: str = "main", invocation: int = 0) -> Any:
        return self.rollout.conversations()[role, invocation].trajectory()

    def check(self) -> None:
        """ids trained = ids sampled: each conversation's active tokens are what its engine sampled in its sessions, in
        order, and each of its turns was asked with just the tokens that stand before it in its segment."""
        for (role, invocation), conversation in self.rollout.conversations().items():
            engine = self.engines[role]
            name = f"7/3/2/0/{role}/{invocation}"
            turns = [i for i, s in enumerate(engine.sessions) if s and s.partition("+")[0] == name]
            made = conversation.trajectory()
            sampled = [token for i in turns for token in engine.sampled[i]]
            assert made.tokens[made.loss_mask == 1].tolist() == sampled
            text_again = [
                self.tokenizer.encode(self.tokenizer.decode(engine.sampled[i]), add_special_tokens=False)
                for i in turns
            ]
            assert any(again != engine.sampled[i] for again, i in zip(text_again, turns, strict=True))
            segments: dict[str | None, list[int]] = {}
            for i in turns:
                before = segments.get(engine.sessions[i], [])
                assert engine.asked[i][: len(before)] == before  # append-only
                segments[engine.sessions[i]] = [*engine.asked[i], *engine.sampled[i]]
            assert made.tokens.tolist() == [token for ids in segments.values() for token in ids]
            assert (made.versions[made.loss_mask == 1] == 3).all()
            assert (made.versions[made.loss_mask == 0] == -1).all()
            assert conversation.mismatches == 0


class Program:
    """An agent program's side of one conversation: it appends what it gets and asks again."""

    def __init__(
        self, team: Team, messages: Sequence[Mapping[str, Any]], role: str = "main", **more: Any
    ) -> None:
        self.team, self.role, self.more = team, role, more
        self.messages: list[Mapping[str, Any]] = list(messages)
        self.replies: list[TurnReply] = []

    def request(self, **more: Any) -> TurnRequest:
        return TurnRequest(self.role, list(self.messages), **{**self.more, **more})

    async def ask(self, *new: Mapping[str, Any], **more: Any) -> TurnReply:
        """Append new messages, take a turn, append its reply."""
        self.messages += new
        reply = await self.team.rollout.turn(self.request(**more))
        self.messages.append(reply.message())
        self.replies.append(reply)
        return reply


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def tool(name: str) -> dict[str, Any]:
    """A tool's schema."""
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}}
    return {
        "type": "function",
        "function": {"name": name, "description": "Finds.", "parameters": parameters},
    }


FIRST = [system("You answer."), user("capital of Fiji")]
DEADLINE = 20.0


def echo(text: str, seed: int) -> str:
    """Noise of its own, and how long the history is."""
    return f"the {seed % 9973} says {len(text)}"


def same(text: str, seed: int) -> str:
    """A policy that always says the same."""
    return "so it is"


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """In a loop of its own, with a deadline."""

    async def bounded() -> Any:
        async with asyncio.timeout(DEADLINE):
            return await main()

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something holds."""
    while not condition():
        await asyncio.sleep(0)


async def error_of(turn: Awaitable[TurnReply]) -> tuple[int, str]:
    with pytest.raises(GatewayError) as caught:
        await turn
    return caught.value.status, caught.value.code


def conversations(team: Team) -> dict[tuple[str, int], str]:
    return {place: team.text(*place) for place in team.rollout.conversations()}
