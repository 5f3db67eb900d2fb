"""Conversations: what is refused by name, and that their text is exactly what was appended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from mgrpo.engines.base import Generation, SamplingParams
from mgrpo.environments.episode import Agent, Conversation, Episode
from mgrpo.errors import ContextOverflowError, RolloutError
from mgrpo.types import Rollout
from tests.play_kit import SlowEngine, one_turn, played, team
from tests.test_tokens import STARTS, tokenizer

Script = Callable[[Episode], Awaitable[object]]


async def _finished(episode: Episode, correct: Any = 1.0, **info: object) -> Rollout:
    await one_turn(episode, "main")
    return episode.finish(correct, **info)


async def _tool_answer_too_long(episode: Episode) -> None:
    main = episode.open("main")
    main.append("hi")
    await main.sample(2, stop=".")
    main.append("w" * 200)


async def _turn_too_long(episode: Episode) -> None:
    await one_turn(episode, "sub", tokens=63)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            _tool_answer_too_long,
            "200 more tokens of context do not fit behind 4 tokens of role 'main', max_length is 64",
        ),
        (_turn_too_long, "a turn of 63 tokens do not fit behind 2 tokens of role 'sub', max_length is 64"),
    ],
)
def test_no_tokens_remaining_is_named_and_counted(script: Script, words: str) -> None:
    """A trajectory that outgrows max_length: role, length, bound and the setting; a failure of its own kind."""
    result = played(script)
    assert result.rollout is None and result.kind == "length"
    role = words.split("'")[1]
    assert words in result.failure and f"agents.{role}.max_length" in result.failure


def test_a_trajectory_may_fill_its_length_exactly() -> None:
    """max_length tokens fit, and what is refused leaves the conversation as it was."""

    async def run() -> Conversation:
        conversation = Episode("q", 0, team(SlowEngine(), max_length=8), 1).open("main")
        conversation.append("abcd")
        with pytest.raises(ContextOverflowError):
            conversation.append("efghi")
        await conversation.sample(4, stop=".")
        assert conversation.remaining == 0
        conversation.append("")
        return conversation

    assert len(asyncio.run(run())) == 8


@pytest.mark.parametrize(
    "score", [float("nan"), float("inf"), None, "1.0", b"1", 1.5, -0.1, [1.0], np.ones(2), {}, object()]
)
def test_a_score_is_a_number_between_0_and_1(score: object) -> None:
    """Of a trajectory as of a rollout: anything else fails the rollout, naming score and value; never scored 0."""

    async def closes(episode: Episode) -> Rollout:
        main = episode.open("main")
        main.append("hi")
        await main.sample(2, stop=".")
        main.close(format=score)  # type: ignore[arg-type]
        return episode.finish(1.0)

    for script, name in (
        (closes, "score 'format' of q/0/0/main/0"),
        (lambda e: _finished(e, score), "correct of q/0"),
    ):
        result = played(script)
        assert result.rollout is None and result.kind == "task" and f"{name} is " in result.failure


@pytest.mark.parametrize("score", [True, 1, np.float32(1), np.float64(1), np.int64(1), np.asarray(1.0)])
def test_numbers_of_other_types_become_floats(score: Any) -> None:
    """Numpy's and Python's numbers are what they say, as plain floats that every record can hold."""
    result = played(lambda episode: _finished(episode, score))
    assert (
        result.rollout is not None and type(result.rollout.correct) is float and result.rollout.correct == 1.0
    )


async def _never_closed(episode: Episode) -> Rollout:
    sub = episode.open("sub")
    sub.append("hi")
    await sub.sample(2, stop=".")
    return await _finished(episode)


async def _never_sampled(episode: Episode) -> Rollout:
    sub = episode.open("sub")
    sub.append("hi")
    sub.close(format=1.0)
    return await _finished(episode)


async def _opened_only(episode: Episode) -> Rollout:
    episode.open("sub")
    return await _finished(episode)


async def _no_main(episode: Episode) -> Rollout:
    await one_turn(episode, "sub")
    return episode.finish(1.0)


async def _surrogate(episode: Episode) -> Rollout:
    episode.open("main").append("page \udcff")
    return await _finished(episode)


async def _no_text(episode: Episode) -> Rollout:
    episode.open("main").append(None)  # type: ignore[arg-type]
    return await _finished(episode)


async def _no_id(episode: Episode) -> Rollout:
    episode.open("main").append_ids([3, -1])
    return await _finished(episode)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (_never_closed, "q/0/0/sub/0 was opened and never closed"),
        (_opened_only, "q/0/0/sub/0 was opened and never closed"),
        (_never_sampled, "q/0/0/sub/0 has no sampled token among 2"),
        (_no_main, "no main trajectory"),
        (_surrogate, "lone surrogate U+DCFF"),
        (_no_text, "NoneType, expected str"),
        (_no_id, "token ids -1..3"),
        (lambda e: _finished(e, answer="\ud800"), "cannot be recorded"),
        (lambda e: _finished(e, answer=1 << 80), "cannot be recorded"),
    ],
)
def test_what_cannot_be_trained_or_recorded_fails_its_rollout(script: Script, words: str) -> None:
    """Found here and named, instead of in a trainer, the store or the record later on. Engines hold nothing of it."""
    engine = SlowEngine()
    result = played(script, engine)
    assert result.rollout is None and result.kind == "task" and words in result.failure
    assert not engine.held


def test_log_probs_that_are_not_finite_fail_their_rollout() -> None:
    """An engine's -inf is named before it reaches a trainer."""

    class Certain(SlowEngine):
        async def generate(self, *args: Any, **options: Any) -> Generation:
            out = await super().generate(*args, **options)
            out.logprobs[-1] = -np.inf
            return out

    result = played(_finished, Certain())
    assert "log-prob of token 3 is -inf" in result.failure


def test_a_finished_rollout_is_one_that_can_be_checked() -> None:
    """check() passes what finish() returned, and nothing else."""

    async def run() -> None:
        episode = Episode("q", 0, team(SlowEngine()), 1)
        rollout = await _finished(episode, answer="Suva")
        assert episode.check(rollout) is rollout
        with pytest.raises(RolloutError, match="returned None"):
            episode.check(None)

    asyncio.run(run())


class Replay(SlowEngine):
    """Says given ids."""

    def __init__(self, says: list[list[int]]) -> None:
        super().__init__(turns=0)
        self.says = says
        self.stops: list[tuple[int, ...]] = []

    async def generate(
        self, prompt_ids: Any, params: SamplingParams, *, seed: int, session: str | None = None
    ) -> Generation:
        self.stops.append(params.stop_token_ids)
        ids = np.asarray(self.says.pop(0), np.int32)
        return Generation(ids, np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32), "stop")


@pytest.mark.parametrize("start", [*STARTS, "never", "byte"])
def test_a_conversation_reads_as_it_was_spoken(start: str) -> None:
    """Whatever a tokenizer puts before a text: appended pieces join without it, a turn keeps the space that the policy
    began with, the stop token is found, and turns that went in as they came out are no mismatch."""
    words = tokenizer(start)
    space = "\u0120" if start.startswith("byte") else "\u2581"
    turns = [[space, "x", "</s>"], ["x", space, "</s>"], ["x"]]
    engine = Replay([words.convert_tokens_to_ids(turn) for turn in turns])

    async def run() -> tuple[list[str], str, int]:
        agents = {r: Agent(r, engine, words, 1.0, 256) for r in ("main", "sub")}
        conversation = Episode("q", 0, agents, 1).open("main")
        texts = []
        for piece in ("find(Fi", "ji)", " then"):
            conversation.append(piece)
            texts.append(await conversation.sample(16, stop="</s>"))
        conversation.close()
        return texts, words.decode(conversation.trajectory().tokens.tolist()), conversation.mismatches

    texts, whole, mismatches = asyncio.run(run())
    assert texts == [" x</s>", "x </s>", "x"]
    assert whole == "find(Fi x</s>ji)x </s> thenx"
    assert mismatches == 0 and engine.stops == [(words.eos_token_id,)] * 3


def test_a_task_reports_numbers_of_its_own() -> None:
    """Each conversation's under its role, the rollout's under "rollout"; of the same name the last counts."""

    async def script(episode: Episode) -> Rollout:
        for words in (3, 5):
            sub = episode.open("sub")
            sub.append("hi")
            await sub.sample(2, stop=".")
            sub.metric("words", 99)
            sub.metric("words", words)
            sub.close()
        episode.metric("hops", np.float32(0.5))
        return await _finished(episode)

    rollout = played(script).rollout
    assert rollout is not None
    assert rollout.metrics == {"rollout/task/hops": [0.5], "sub/task/words": [3.0, 5.0]}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("two words", 1, "metric 'two words' of q/0: expected a name of letters"),
        ("a/b", 1, "metric 'a/b'"),
        ("hops", float("nan"), "metric 'hops' of q/0 is nan, expected a finite number"),
        ("hops", float("inf"), "is inf"),
        ("hops", "3", "is '3'"),
        ("hops", None, "is None"),
    ],
)
def test_a_metric_that_is_no_number_fails_its_rollout(name: str, value: Any, words: str) -> None:
    """By name and value, whoever reports it; nothing that cannot be averaged reaches a report."""

    async def script(episode: Episode) -> Rollout:
        episode.metric(name, value)
        return await _finished(episode)

    result = played(script)
    assert result.kind == "task" and words in result.failure


def test_a_turn_that_encodes_otherwise_is_counted() -> None:
    """The policy may say "j", "i" where the tokenizer writes "ji": that turn would be trained with other ids."""
    words = tokenizer("always")
    apart = words.convert_tokens_to_ids(["j", "i", "</s>"])
    engine = Replay([apart, apart])

    async def run() -> int:
        agents = {r: Agent(r, engine, words, 1.0, 256) for r in ("main", "sub")}
        conversation = Episode("q", 0, agents, 1).open("main")
        for _ in range(2):
            conversation.append("x")
            await conversation.sample(16, stop="</s>")
        return conversation.mismatches

    assert asyncio.run(run()) == 2
